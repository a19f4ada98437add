"""Run by torchrun, not by pytest: several trainings one after another in one process group.

Its arguments are JSON lists, each the command line of one `python -m paint_engine.train`.
"""

import json
import sys

import torch

from paint_engine.distributed import close_world
from paint_engine.train import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for argv in sys.argv[1:]:
        main(json.loads(argv))
    close_world()
