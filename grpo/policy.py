"""The model being trained, its tokenizer, its two precisions and the reference, which stays or follows it.

On CUDA the fp32 *masters* are what DistributedDataParallel and AdamW see, and one bf16 *working* copy at fixed
addresses serves the sampler and the training forward alike; `refresh` rewrites it in place after each optimizer
step. In fp32 the two are the same module. What is not trained (under LoRA, grpo.lora, nearly all) has no master: it is
there once, in the precision of the forward pass.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"  # the file that tells a folder in PEFT's format


class Policy:
    """masters: the model that is trained, in fp32.  model: the working copy that samples and runs forward."""

    def __init__(self, masters: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str):
        refuse_unsupported(masters)
        self.masters = masters
        self._trained = [name for name, parameter in masters.named_parameters() if parameter.requires_grad]
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
                if working is not master:
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
        masters = dict(self.masters.named_parameters())
        return {"masters": {name: masters[name].detach() for name in self._trained}}

    def load_state_dict(self, state: dict) -> None:
        """Masters from `state_dict`, then the working copy."""
        masters = dict(self.masters.named_parameters())
        expected = {name: tuple(masters[name].shape) for name in self._trained}
        found = {name: tuple(tensor.shape) for name, tensor in state["masters"].items()}
        if expected != found:
            differing = sorted(expected.items() ^ found.items())[:4]
            raise ValueError(
                f"the checkpoint does not fit this model; first differences (name, shape): {differing}; "
                "resume with the model.path and the lora section it was trained with"
            )
        with torch.no_grad():
            for name in self._trained:
                masters[name].copy_(state["masters"][name])
        self.refresh()

    def copy_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of the masters or of the working copy; what is not trained is shared."""
        pairs = zip(model.parameters(), self.masters.parameters(), strict=True)
        return copy.deepcopy(model, {id(own): own for own, master in pairs if not master.requires_grad}).eval()


def bf16_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy whose parameters are bf16; those that are bf16 already are shared.

    Buffers stay fp32: rotary frequencies do not survive rounding.
    """
    shared = {id(parameter): parameter for parameter in model.parameters() if parameter.dtype == torch.bfloat16}
    duplicate = copy.deepcopy(model, shared).requires_grad_(False)
    for parameter in duplicate.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return duplicate


class MovingReference(Policy):
    """A reference that follows the policy at a distance.

    Its masters are fp32 as the policy's are: many small moves add up where bf16 would round each of them away.
    """

    def __init__(self, policy: Policy):
        masters = policy.copy_of(policy.masters)
        super().__init__(masters, policy.tokenizer, "fp32" if policy.model is policy.masters else "bf16")
        masters.requires_grad_(False)

    @torch.no_grad()
    def follow(self, policy: Policy, mix: float) -> None:
        """masters <- (1 - mix) * masters + mix * the policy's masters; mix 1 is a copy, bit for bit."""
        for own, current in zip(self.masters.parameters(), policy.masters.parameters(), strict=True):
            if own is not current:
                own.lerp_(current, mix)
        self.refresh()


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` means bf16 on CUDA and fp32 elsewhere."""
    return ("bf16" if device.type == "cuda" else "fp32") if precision == "auto" else precision


def load_policy(path: str, *, precision: str, device: torch.device) -> Policy:
    """A hub id or local folder -> Policy on `device`, fp32 masters, SDPA attention, gradients on."""
    masters = from_hub(AutoModelForCausalLM, path, dtype=torch.float32, attn_implementation="sdpa").to(device)
    # Dropout is refused; train mode is what lets gradient checkpointing work.
    return Policy(masters.train(), load_tokenizer(path), choose_precision(precision, device))


def load_reference(policy: Policy) -> PreTrainedModel:
    """The frozen reference: the policy as it is now, in its own forward precision."""
    return policy.copy_of(policy.model).requires_grad_(False)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or folder; one without a padding token pads with EOS: no length is read from ids."""
    tokenizer = from_hub(AutoTokenizer, path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model_config(path: str) -> object:
    """The transformers config of a hub id or local folder, without its weights."""
    if (Path(path).expanduser() / ADAPTER_CONFIG).is_file():
        raise ValueError(f"model.path={path!r} holds an adapter; first: python -m grpo.lora merge {path} OUT")
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
