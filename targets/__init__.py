"""The targets: one file per family. Installed as ``convgen.targets``."""
