"""The entry point of a SageMaker job (recipes.md): train.py in a folder that SageMaker keeps. A restarted job resumes.

torchrun runs this on every rank, at the top of the repository, with the job's hyperparameters as options of train.py.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path

RUN = Path("/opt/ml/checkpoints/run")

if any(RUN.glob("checkpoints/step_*")):  # interrupted, or a new job on the same checkpoints: the run has its own config
    options = ["--resume", str(RUN)]
else:
    if os.environ["RANK"] == "0":
        shutil.rmtree(RUN, ignore_errors=True)  # interrupted before its first checkpoint
    options = ["--run-dir", str(RUN), *sys.argv[1:]]
sys.argv[1:] = options
sys.path.insert(0, os.getcwd())
runpy.run_path("train.py", run_name="__main__")
