"""Settings that must hold before torch is imported: one thread a process, and no test reaches the network.

Where there is no CUDA device Triton's kernels are interpreted, which they learn when they are imported.
"""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Triton's interpreter before 3.7 reads a loop's bound off an array of one element, as numpy 2.4 forbids."""
    try:
        return (yield)
    except Exception as error:
        is_that = type(error).__name__ == "InterpreterError" and "only 0-dimensional arrays can be" in str(error)
        if is_that and tuple(map(int, sys.modules["triton"].__version__.split(".")[:2])) < (3, 7):
            pytest.skip("this triton cannot interpret a loop with this numpy: needs triton >= 3.7 or an older numpy")
        raise


@pytest.fixture
def base(tmp_path):
    """A tiny base model in a folder."""
    from tests.tiny import tiny_qwen2, word_tokenizer  # transformers takes seconds: only where it is used

    folder = tmp_path / "base"
    tiny_qwen2().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
