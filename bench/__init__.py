"""Programs that measure: run.py on CPUs, cuda.py on GPUs, efficiency.py the search."""
