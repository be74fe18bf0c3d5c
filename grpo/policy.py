"""The model being trained, its tokenizer, its two precisions and the reference, which stays or follows it.

On CUDA the fp32 *masters* are what DistributedDataParallel and AdamW see, and one bf16 *working* copy at fixed
addresses serves the sampler and the training forward alike; `refresh` rewrites it in place after each optimizer
step. In fp32 the two are the same module. What is not trained (under LoRA, grpo.lora, nearly all) has no master: it is
there once, in the precision of the forward pass. Over several ranks the masters may be shared out (grpo.sharding).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grpo.sharding import fill, fill_all, for_writer, share_of

ADAPTER_CONFIG = "adapter_config.json"  # the file that tells a folder in PEFT's format


class Policy:
    """masters: the model that is trained, in fp32.  model: the working copy that samples and runs forward.

    trained: the parameters that get gradients.  own: what this rank keeps of each, by name: itself, or a share of it.
    """

    def __init__(self, masters: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str):
        refuse_unsupported(masters)
        self.masters = masters
        self.own = {name: parameter for name, parameter in masters.named_parameters() if parameter.requires_grad}
        self.trained = list(self.own.values())
        self.tokenizer = tokenizer
        self.model = masters if precision == "fp32" else bf16_copy(masters)
        self.is_sampler_only = False  # the working copy, which then is made for every rollout

    @property
    def context_length(self) -> int:
        """Most tokens, prompt and completion together, that the model has positions for."""
        return self.model.config.max_position_embeddings

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the working copy up to the masters, in place: its addresses never change."""
        working = dict(self.model.named_parameters())
        pairs = ((working[name], own) for name, own in self.own.items())
        # A working copy without memory gets its weights in `at_hand`.
        fill_all((whole, own) for whole, own in pairs if own is not whole and whole.untyped_storage().nbytes())

    @torch.no_grad()
    def keep_shares(self, mesh: DeviceMesh) -> None:
        """Keep this rank's share of each master that is trained. In fp32 it is a part of the working copy; in bf16 the
        masters are then without memory: what is left of them has their shape and gets their gradients."""
        for name, master in list(self.own.items()):
            share = share_of(master.detach(), mesh)
            if self.model is not self.masters:
                share = share.clone()
                master.data = master.new_zeros(()).expand(master.shape)
            self.own[name] = nn.Parameter(share)

    def sample_from_copy(self) -> None:
        """From here on training runs the masters themselves, and the working copy is for `at_hand` alone."""
        if self.model is self.masters:
            self.model = copy.deepcopy(self.masters).requires_grad_(False)
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()  # in a storage of its own
        self.is_sampler_only = True

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Within it the working copy has its weights; outside, too, unless it is there to sample only."""
        if not self.is_sampler_only:
            yield
            return
        try:
            for parameter in self.model.parameters():
                parameter.untyped_storage().resize_(parameter.nbytes)
            self.refresh()
            yield
        finally:
            for parameter in self.model.parameters():
                parameter.untyped_storage().resize_(0)

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
        """The fp32 masters, bit for bit, and no copy of whole ones. Of masters in shares every rank must call it, and
        rank 0 gets them."""
        return {"masters": {name: for_writer(own) for name, own in self.own.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Masters from `state_dict`, then the working copy."""
        expected = {name: tuple(own.shape) for name, own in self.own.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state["masters"].items()}
        if expected != found:
            differing = sorted(expected.items() ^ found.items())[:4]
            raise ValueError(
                f"the checkpoint does not fit this model; first differences (name, shape): {differing}; "
                "resume with the model.path and the lora section it was trained with"
            )
        with torch.no_grad():
            for name, own in self.own.items():
                fill(own, state["masters"][name])
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
        super().__init__(masters, policy.tokenizer, "bf16" if policy.model.dtype == torch.bfloat16 else "fp32")
        masters.requires_grad_(False)

    @torch.no_grad()
    def follow(self, policy: Policy, mix: float) -> None:
        """masters <- (1 - mix) * masters + mix * the policy's masters; mix 1 is a copy, bit for bit."""
        for name, own in self.own.items():
            own.lerp_(policy.own[name], mix)
        self.refresh()


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto` means bf16 on CUDA and fp32 elsewhere, on a GPU without bf16 too."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    is_slow = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp32" if is_slow else "bf16"


def load_policy(path: str, *, precision: str, device: torch.device) -> Policy:
    """A hub id or local folder -> Policy on `device`, fp32 masters, SDPA attention, gradients on."""
    masters = load_model(path, torch.float32).to(device)
    # Dropout is refused; train mode is what lets gradient checkpointing work.
    return Policy(masters.train(), from_hub(AutoTokenizer, path), choose_precision(precision, device))


def load_model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a hub id or local folder, with SDPA attention. ValueError where its files do not fill it:
    transformers would draw what is left at random, with a warning at most."""
    load_model_config(path)  # refuses, in words, what transformers would fail at or load otherwise
    options = {"dtype": dtype, "attn_implementation": "sdpa", "ignore_mismatched_sizes": True}
    model, found = from_hub(AutoModelForCausalLM, path, output_loading_info=True, **options)
    absent = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if absent:
        others = f"; they have instead {sorted(found['unexpected_keys'])[:2]}" if found["unexpected_keys"] else ""
        raise ValueError(
            f"the files of model {path!r} lack {len(absent)} of the weights of its config.json, or have "
            f"them in another shape: {absent[:2]}{others}; mend config.json or save the model again"
        )
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # a temperature without do_sample, say: transformers reads what it then refuses to write
        tokens = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**tokens)
    return model


def load_reference(policy: Policy) -> PreTrainedModel:
    """The frozen reference: the policy as it is now, in its own forward precision."""
    return policy.copy_of(policy.model).requires_grad_(False)


def load_model_config(path: str) -> object:
    """The transformers config of a hub id or local folder, without its weights."""
    if (Path(path).expanduser() / "config.yaml").is_file():
        raise ValueError(f"model.path={path!r} is a run folder; name one of its checkpoints: {path}/checkpoints/step_N")
    if (Path(path).expanduser() / ADAPTER_CONFIG).is_file():
        raise ValueError(f"model.path={path!r} holds an adapter; first: python -m grpo.lora merge {path} OUT")
    config = from_hub(AutoConfig, path)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"model.path={path!r} is quantized; name what it was made from, with lora.quantize=nf4")
    return config


def from_hub(auto_class: type, path: str, **kwargs: object) -> object:
    """`auto_class.from_pretrained(path)`, with an error that says how to work without the hub."""
    folder = Path(path).expanduser()
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not folder.is_dir():
        raise ValueError(
            f"model {path!r} is no folder; pass a folder in Hugging Face layout "
            "(config.json, *.safetensors, tokenizer files) or a hub id"
        )
    try:
        # Not asked for, transformers would ask on the terminal whether to run code that comes with the model.
        return auto_class.from_pretrained(folder if folder.is_dir() else path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if folder.is_dir() or not isinstance(error, OSError):
            raise ValueError(f"could not load model {path!r}: {first_line}") from error
        raise ValueError(
            f"model {path!r}: no folder of that name is here, and the hub has no such model or cannot be reached from "
            f"here; pass a folder that holds it ({first_line})"
        ) from error


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Refuse what sees more than text, dropout, by which old and new log-probs differ, and what our head or SDPA would
    leave out."""
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"{type(model).__name__} has parts for more than text, which nothing here trains; use another")
    named = model.config.to_dict().items()
    dropouts = {key: value for key, value in named if "dropout" in key and isinstance(value, int | float) and value > 0}
    for unused in ("classifier_dropout", "summary_first_dropout"):  # of a head that classifies
        dropouts.pop(unused, None)
    dropouts |= {name: part.p for name, part in model.named_modules() if isinstance(part, nn.Dropout) and part.p > 0}
    if dropouts:
        raise ValueError(
            f"the model has dropout above 0 ({dropouts}): old and new log-probs would differ; "
            "set it to 0 in the model's config.json"
        )
    scales = {name: getattr(model.config, name, None) for name in ("logit_scale", "logits_scaling")}
    if any(scale not in (None, 1) for scale in scales.values()):
        raise ValueError(f"the model scales its logits ({scales}), which the log-prob head does not apply; use another")
    if getattr(model.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
        raise ValueError("the model caps its attention scores, which SDPA leaves out; use another")
