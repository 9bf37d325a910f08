"""Programs that measure: run.py and network.py on CPUs, cuda.py on GPUs, efficiency.py the search."""
