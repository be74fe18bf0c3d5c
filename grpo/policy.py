"""The model being trained, its tokenizer, its two precisions, and the reference, frozen or following the policy.

In bf16, DistributedDataParallel and AdamW see the fp32 *masters*, and one bf16 *working* copy at fixed addresses
serves both the sampler and the training forward; `refresh` rewrites it in place after each optimizer step. In fp32 the
two are the same module. A parameter that is not trained (under LoRA, grpo.lora, nearly all) has no master: it exists
once, in the precision of the forward pass. Over several ranks the masters may be sharded (grpo.sharding).
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

from grpo.sharding import fill, fill_all, gather_to_writer, shard_of

ADAPTER_CONFIG = "adapter_config.json"  # its presence marks a folder in PEFT's format


class Policy:
    """masters: the model that is trained, in fp32.  model: the working copy that samples and runs forward.

    trained: the parameters that get gradients.  local_parameters: what this rank keeps of each, by name: the whole, or
    its shard.
    """

    def __init__(self, masters: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str):
        refuse_unsupported(masters)
        self.masters = masters
        trained = {name: parameter for name, parameter in masters.named_parameters() if parameter.requires_grad}
        self.local_parameters, self.trained = trained, list(trained.values())
        self.tokenizer = tokenizer
        self.model = masters if precision == "fp32" else bf16_copy(masters)
        self.is_sampler_only = False  # the working copy; it then has weights within `weights_loaded` only

    @property
    def context_length(self) -> int:
        """Most tokens, prompt plus completion, that the model has positions for."""
        return self.model.config.max_position_embeddings

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters into the working copy, in place: its addresses never change."""
        working = dict(self.model.named_parameters())
        pairs = ((working[name], local) for name, local in self.local_parameters.items())
        # Skipped: a working copy whose memory is freed gets its weights in `weights_loaded`.
        fill_all((whole, local) for whole, local in pairs if local is not whole and whole.untyped_storage().nbytes())

    @torch.no_grad()
    def keep_shards(self, mesh: DeviceMesh) -> None:
        """Keep only this rank's shard of each trained master. In fp32 it is a view of the working copy. In bf16 the
        masters give up their memory: as expanded scalars they keep their shape and still receive gradients."""
        for name, master in list(self.local_parameters.items()):
            shard = shard_of(master.detach(), mesh)
            if self.model is not self.masters:
                shard = shard.clone()
                master.data = master.new_zeros(()).expand(master.shape)
            self.local_parameters[name] = nn.Parameter(shard)

    def sample_from_copy(self) -> None:
        """From here on training runs on the masters themselves; the working copy only samples (`weights_loaded`)."""
        if self.model is self.masters:
            self.model = copy.deepcopy(self.masters).requires_grad_(False)
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()  # a storage of its own, which `weights_loaded` can resize
        self.is_sampler_only = True

    @contextmanager
    def weights_loaded(self) -> Iterator[None]:
        """Within it the working copy has its weights. One that only samples has none outside: its memory is freed."""
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

        state: write these weights, a copy of an earlier `state_dict`, instead of the current ones.
        """
        weights = None
        if state is not None:
            is_parameter = dict(self.model.named_parameters(remove_duplicate=False)).keys().__contains__
            weights = {name: buffer for name, buffer in self.model.state_dict().items() if not is_parameter(name)}
            weights |= {name: master.to(self.model.dtype) for name, master in state["masters"].items()}
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    def state_dict(self) -> dict:
        """The fp32 masters, bit for bit: the tensors themselves, not copies. Sharded ones are gathered on rank 0, so
        every rank must call it."""
        return {"masters": {name: gather_to_writer(local) for name, local in self.local_parameters.items()}}

    def load_state_dict(self, state: dict) -> None:
        """Fill the masters from `state_dict`, then the working copy. ValueError if names or shapes differ."""
        expected = {name: tuple(local.shape) for name, local in self.local_parameters.items()}
        found = {name: tuple(tensor.shape) for name, tensor in state["masters"].items()}
        if expected != found:
            differing = sorted(expected.items() ^ found.items())[:4]
            raise ValueError(
                f"the checkpoint does not fit this model; first differences (name, shape): {differing}; "
                "resume with the model.path and the lora section it was trained with"
            )
        with torch.no_grad():
            for name, local in self.local_parameters.items():
                fill(local, state["masters"][name])
        self.refresh()

    def copy_of(self, model: PreTrainedModel) -> PreTrainedModel:
        """A copy of `model`, the masters or the working copy, that shares the parameters that are not trained."""
        pairs = zip(model.parameters(), self.masters.parameters(), strict=True)
        return copy.deepcopy(model, {id(shared): shared for shared, master in pairs if not master.requires_grad}).eval()


def bf16_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy with bf16 parameters; those that are bf16 already are shared, not copied.

    Buffers stay fp32: rotary frequencies do not survive rounding.
    """
    shared = {id(parameter): parameter for parameter in model.parameters() if parameter.dtype == torch.bfloat16}
    duplicate = copy.deepcopy(model, shared).requires_grad_(False)
    for parameter in duplicate.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return duplicate


class MovingReference(Policy):
    """A reference that is moved towards the policy from time to time.

    Its masters are fp32: bf16 would round each small move away, and many would not add up.
    """

    def __init__(self, policy: Policy):
        masters = policy.copy_of(policy.masters)
        super().__init__(masters, policy.tokenizer, "bf16" if policy.model.dtype == torch.bfloat16 else "fp32")
        masters.requires_grad_(False)

    @torch.no_grad()
    def follow(self, policy: Policy, mix: float) -> None:
        """masters <- (1 - mix) * masters + mix * the policy's masters; mix 1 is a copy, bit for bit."""
        for name, local in self.local_parameters.items():
            local.lerp_(policy.local_parameters[name], mix)
        self.refresh()


def choose_precision(precision: str, device: torch.device) -> str:
    """The precision of the forward pass. auto: bf16 on a CUDA device that supports it, else fp32."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    is_slow = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp32" if is_slow else "bf16"


def load_policy(path: str, *, precision: str, device: torch.device) -> Policy:
    """A hub id or local folder -> Policy on `device`, with fp32 masters, SDPA attention and gradients on."""
    masters = load_model(path, torch.float32).to(device)
    # Gradient checkpointing needs train mode; there is no dropout that it could turn on.
    return Policy(masters.train(), from_hub(AutoTokenizer, path), choose_precision(precision, device))


def load_model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a hub id or local folder, with SDPA attention. ValueError if its files lack weights: transformers
    would initialise those at random, with a warning at most."""
    load_model_config(path)  # clear errors for what transformers would fail on, or load as something else
    options = {"dtype": dtype, "attn_implementation": "sdpa", "ignore_mismatched_sizes": True}
    model, found = from_hub(AutoModelForCausalLM, path, output_loading_info=True, **options)
    absent = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if absent:
        others = f"; they have instead {sorted(found['unexpected_keys'])[:2]}" if found["unexpected_keys"] else ""
        raise ValueError(
            f"the files of model {path!r} lack {len(absent)} of the weights of its config.json, or have "
            f"them in another shape: {absent[:2]}{others}; fix config.json or save the model again"
        )
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError:  # e.g. temperature without do_sample: transformers loads such a config, then refuses to save it
        tokens = {name: getattr(generation, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**tokens)
    return model


def load_reference(policy: Policy) -> PreTrainedModel:
    """The frozen reference: the policy as it is now, in the precision of the forward pass."""
    return policy.copy_of(policy.model).requires_grad_(False)


def load_model_config(path: str) -> object:
    """The transformers config of a hub id or folder. ValueError for a run folder, adapters or a quantized model."""
    if (Path(path).expanduser() / "config.yaml").is_file():
        raise ValueError(f"model.path={path!r} is a run folder; name one of its checkpoints: {path}/checkpoints/step_N")
    if (Path(path).expanduser() / ADAPTER_CONFIG).is_file():
        raise ValueError(f"model.path={path!r} holds an adapter; first: python -m grpo.lora merge {path} OUT")
    config = from_hub(AutoConfig, path)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"model.path={path!r} is quantized; use the unquantized model, with lora.quantize=nf4")
    return config


def from_hub(auto_class: type, path: str, **kwargs: object) -> object:
    """`auto_class.from_pretrained(path)`; ValueError says what is wrong, and what to pass without a connection."""
    folder = Path(path).expanduser()
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not folder.is_dir():
        raise ValueError(
            f"model path {path!r} is not a folder; pass a folder in Hugging Face layout "
            "(config.json, *.safetensors, tokenizer files) or a hub id"
        )
    try:
        # Unset, transformers would ask on the terminal whether to run code that comes with the model.
        return auto_class.from_pretrained(folder if folder.is_dir() else path, trust_remote_code=False, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if folder.is_dir() or not isinstance(error, OSError):
            raise ValueError(f"could not load model {path!r}: {first_line}") from error
        raise ValueError(
            f"model {path!r}: there is no such folder here, and the hub has no such model or cannot be reached; "
            f"pass a folder that holds it ({first_line})"
        ) from error


def refuse_unsupported(model: PreTrainedModel) -> None:
    """ValueError for a model that is not text-only, has dropout (old and new log-probs would differ), or does something
    to its logits or attention scores that our head or SDPA leaves out."""
    if model.config.get_text_config() is not model.config:
        raise ValueError(f"{type(model).__name__} is multimodal; only text models are supported; use another")
    named = model.config.to_dict().items()
    dropouts = {key: value for key, value in named if "dropout" in key and isinstance(value, int | float) and value > 0}
    for unused in ("classifier_dropout", "summary_first_dropout"):  # of a classification head, which is not used
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
