"""Settings that must hold before torch is imported: one thread a process, and no test reaches the network.

Where there is no CUDA device Triton's kernels are interpreted, which they learn when they are imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def base(tmp_path):
    """A tiny base model in a folder."""
    from tests.tiny import tiny_qwen2, word_tokenizer  # transformers takes seconds: only where it is used

    folder = tmp_path / "base"
    tiny_qwen2().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder
