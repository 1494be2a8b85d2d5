"""Every test runs offline and on one thread: tiny matrices gain nothing from a second, and wait for it when it is busy.

Measured on two busy cores: tests/test_layers.py takes 11 s on one thread and 177 s on two.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of the fresh processes too
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the default tier is the CPU's, wherever it runs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
