"""The parts of a run, each built or checked by a module; `training/build.py` has their order."""
