"""The model being trained, its tokenizer, its two precisions and the frozen reference.

On CUDA the fp32 *masters* are what DistributedDataParallel and AdamW see, and one bf16 *working* copy at fixed
addresses serves the sampler and the training forward alike; `refresh` rewrites it in place after each optimizer
step. In fp32 the two are the same module.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


class Policy:
    """masters: the fp32 model that is trained.  model: the working copy that samples and runs forward."""

    def __init__(self, masters: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str):
        refuse_unsupported(masters)
        self.masters = masters
        self.tokenizer = tokenizer
        self.model = masters if precision == "fp32" else bf16_copy(masters)

    @property
    def context_length(self) -> int:
        """Most tokens, prompt and completion together, that the model has positions for."""
        return self.model.config.max_position_embeddings

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the working copy up to the masters, in place: its addresses never change."""
        if self.model is not self.masters:
            for working, master in zip(self.model.parameters(), self.masters.parameters(), strict=True):
                working.copy_(master)

    def save(self, folder: Path, state: dict | None = None) -> None:
        """Write the working copy and the tokenizer in Hugging Face layout.

        state: a copy of an earlier `state_dict`, to be written instead of what the policy is now.
        """
        weights = None
        if state is not None:
            is_parameter = dict(self.model.named_parameters(remove_duplicate=False)).keys().__contains__
            weights = {name: buffer for name, buffer in self.model.state_dict().items() if not is_parameter(name)}
            weights |= {name: master.to(self.model.dtype) for name, master in state["masters"].items()}
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    def state_dict(self) -> dict:
        """The fp32 masters, bit for bit, and no copy of them."""
        return {"masters": {name: parameter.detach() for name, parameter in self.masters.named_parameters()}}

    def load_state_dict(self, state: dict) -> None:
        """Masters from `state_dict`, then the working copy."""
        expected = {name: tuple(parameter.shape) for name, parameter in self.masters.named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in state["masters"].items()}
        if expected != found:
            differing = sorted(expected.items() ^ found.items())[:4]
            raise ValueError(
                f"the checkpoint does not fit this model; first differences (name, shape): {differing}; "
                "resume with the model.path it was trained from"
            )
        with torch.no_grad():
            for name, parameter in self.masters.named_parameters():
                parameter.copy_(state["masters"][name])
        self.refresh()


def bf16_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy whose parameters are bf16. Buffers stay fp32: rotary frequencies do not survive rounding."""
    duplicate = copy.deepcopy(model).requires_grad_(False)
    for parameter in duplicate.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return duplicate


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` means bf16 on CUDA and fp32 elsewhere."""
    return ("bf16" if device.type == "cuda" else "fp32") if precision == "auto" else precision


def load_policy(path: str, *, precision: str, device: torch.device) -> Policy:
    """A hub id or local folder -> Policy on `device`, fp32 masters, SDPA attention, gradients on."""
    masters = from_hub(AutoModelForCausalLM, path, dtype=torch.float32, attn_implementation="sdpa").to(device)
    policy = Policy(masters, load_tokenizer(path), choose_precision(precision, device))
    masters.train()
    policy.model.train()  # dropout is refused; train mode is what lets gradient checkpointing work
    return policy


def load_reference(policy: Policy) -> PreTrainedModel:
    """The frozen reference: a copy of the policy as it is now, in the policy's own forward precision."""
    return copy.deepcopy(policy.model).requires_grad_(False).eval()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder; one without a padding token pads with EOS: no length is read from ids."""
    tokenizer = from_hub(AutoTokenizer, path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(path: str) -> object:
    """The transformers config of a hub id or local folder, without its weights."""
    return from_hub(AutoConfig, path)


def from_hub(auto_class: type, path: str, **kwargs: object) -> object:
    """`auto_class.from_pretrained(path)`, with an error that says how to work without the hub."""
    folder = Path(path).expanduser()
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not folder.is_dir():
        raise ValueError(
            f"model.path={path!r} is no folder; pass a folder in Hugging Face layout "
            "(config.json, *.safetensors, tokenizer files) or a hub id"
        )
    try:
        return auto_class.from_pretrained(folder if folder.is_dir() else path, **kwargs)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"could not load {path!r} as a {auto_class.__name__}: {first_line}\n"
            "If the hub cannot be reached from here, download the model elsewhere and pass its folder: --model.path DIR"
        ) from error


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Dropout makes old and new log-probs differ; scaled logits are not applied by our head. Refuse both."""
    named = model.config.to_dict().items()
    dropouts = {key: value for key, value in named if "dropout" in key and isinstance(value, int | float) and value > 0}
    dropouts |= {name: part.p for name, part in model.named_modules() if isinstance(part, nn.Dropout) and part.p > 0}
    if dropouts:
        raise ValueError(
            f"the model has dropout above 0 ({dropouts}): old and new log-probs would differ; "
            "set it to 0 in the model's config.json"
        )
    scales = {name: getattr(model.config, name, None) for name in ("logit_scale", "logits_scaling")}
    if any(scale not in (None, 1) for scale in scales.values()):
        raise ValueError(f"the model scales its logits ({scales}), which the log-prob head does not apply; use another")
