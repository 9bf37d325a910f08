"""The schedules: one file per algorithm and target kind. Installed as ``convgen.schedules``."""
