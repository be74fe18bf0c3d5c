"""Low-rank adapters (LoRA, arXiv:2106.09685) in place of full fine-tuning, in memory and in PEFT's file format.

`load` gives train.py and eval.py their Policy. The base is frozen, in the precision of the forward pass or in 4 bits,
and exists once: masters, working copy and reference share its tensors. The reference computes as the base does, because
its own copy of the adapters stays at its initial 0.

    python -m grpo.lora merge RUN OUT    write W + scale B A as a plain Hugging Face model
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from grpo import checkpoint
from grpo.config import LoraConfig
from grpo.policy import ADAPTER_CONFIG, Policy, choose_precision, from_hub, load_model, load_model_config, load_policy

WEIGHTS = "adapter_model.safetensors"
# PEFT's keys: those that we read, with our names; those without effect on a trained adapter; values others may have.
PEFT_KEYS = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
PEFT_KEYS |= {name: name for name in ("target_modules", "modules_to_save")}
WITHOUT_EFFECT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version"}
WITHOUT_EFFECT |= {"qalora_group_size", "revision", "task_type"}
ALLOWED = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True}


class LoraLinear(nn.Linear):
    """W x + bias + scale B A x, where W and bias are those of `base` (arXiv:2106.09685 section 4.1).

    scale = alpha / rank, or alpha / sqrt(rank) with rslora (arXiv:2312.03732).  lora_A: [rank, in], uniform within
    +-1 / sqrt(in) as in the authors' code (in the paper: Gaussian); lora_B: [out, rank], 0, so that training starts at
    the base. Both fp32.
    """

    def __init__(self, base: nn.Linear, settings: LoraConfig, generator: torch.Generator):
        nn.Module.__init__(self)  # nn.Linear's __init__ would allocate a second W
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)
        self.dropout = settings.dropout
        bound = base.in_features**-0.5
        drawn = torch.empty(settings.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(drawn.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, settings.rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        # No dropout in passes without gradient (sampler, old, reference): they measure the policy itself.
        kept = F.dropout(x, self.dropout) if self.dropout and torch.is_grad_enabled() else x
        output, low = self.frozen(x), F.linear(kept, self.lora_A)
        if torch.compiler.is_compiling():  # fused into the elementwise kernel that follows
            return output + self.scale * F.linear(low, self.lora_B)
        total = output.view(-1, self.out_features)  # in place: saves a tensor of this size
        total.addmm_(low.view(-1, low.shape[-1]), self.lora_B.t(), alpha=self.scale)
        return output

    def frozen(self, x: Tensor) -> Tensor:
        """W x + bias."""
        return F.linear(x, self.weight, self.bias)


class Nf4LoraLinear(LoraLinear):
    """LoraLinear with W in 4 bits. W is not an nn.Parameter, so that no cast and no optimizer touches it."""

    def __init__(self, base: nn.Linear, settings: LoraConfig, generator: torch.Generator):
        super().__init__(base, settings, generator)
        del self.weight
        self.weight = Nf4(base.weight.detach())

    def frozen(self, x: Tensor) -> Tensor:
        return self.weight.product(x, self.bias)


class Nf4:
    """A frozen matrix in 4 bits (NormalFloat, arXiv:2305.14314 section 3, without its double quantization).

    Each block of 64 consecutive weights has one fp32 scale, its largest magnitude. Copies of a model share the matrix.
    """

    BYTES_PER_WEIGHT = 1 / 2 + 4 / 64

    def __init__(self, weight: Tensor):
        self._library = bitsandbytes()
        self.packed, self.state = self._library.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)

    def __deepcopy__(self, memo: dict) -> Nf4:
        return self

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W x + bias in the precision of x. The backward pass dequantizes W again instead of keeping it."""
        return self._library.matmul_4bit(x, self.packed.t(), self.state, bias=bias)


LAYERS = {"none": LoraLinear, "nf4": Nf4LoraLinear}  # by lora.quantize


def bitsandbytes() -> object:
    """The library that computes with 4-bit weights. ValueError if it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "lora.quantize=nf4, but bitsandbytes is not installed; pip install 'bitsandbytes>=0.46', or -e '.[quant]'"
        ) from error
    return bitsandbytes


def add_adapters(
    model: PreTrainedModel, settings: LoraConfig, *, seed: int = 0, device: torch.device | None = None
) -> None:
    """Freeze `model` in place, except for new adapters on `target_modules` and all of `modules_to_save`, in fp32.

    As in PEFT a target matches every linear layer whose dotted name ends in .TARGET, a module to save every module
    whose name ends in it, dot or not. ValueError for a name without a match. device: where adapted layers are moved to.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    targets = _named(model, settings.target_modules, "lora.target_modules", nn.Linear)
    saved = _named(model, settings.modules_to_save, "lora.modules_to_save", nn.Module)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    for name, module in targets.items():
        if module in ends:
            raise ValueError(f"lora.target_modules names the head {name}; train it whole: lora.modules_to_save")
        model.set_submodule(name, LAYERS[settings.quantize](module.to(device), settings, generator))
    for name, module in saved.items():
        if module in ends and model.config.tie_word_embeddings:
            raise ValueError(f"lora.modules_to_save names {name}, which this model ties to another; leave it out")
        if any(part in targets.values() or isinstance(part, LoraLinear) for part in module.modules()):
            raise ValueError(
                f"lora.modules_to_save names {name}, in which lora.target_modules has adapters; choose one"
            )
        for parameter in module.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _named(model: nn.Module, names: tuple[str, ...], key: str, kind: type) -> dict[str, nn.Module]:
    """The modules that `names` match; `key` is the config key for the error. Subclasses of nn.Linear do not match: they
    may compute something else."""
    is_kind = lambda module: kind is nn.Module or type(module) is kind
    modules = {name: module for name, module in model.named_modules() if name and is_kind(module)}
    matches = lambda module, name: f".{module}".endswith(f".{name}" if kind is nn.Linear else name)
    for name in names:
        if not any(matches(module, name) for module in modules):
            known = sorted({last for module in modules if not (last := module.rpartition(".")[2]).isdecimal()})
            raise ValueError(f"{key}: {type(model).__name__} has no {name!r}; it has {', '.join(known)}")
    return {module: modules[module] for module in modules if any(matches(module, name) for name in names)}


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Replace every adapted layer of an fp32 model by a plain linear layer of W + scale B A, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight, plain.bias = layer.weight, layer.bias
            plain.weight.copy_(layer.weight + layer.scale * (layer.lora_B @ layer.lora_A))
            model.set_submodule(name, plain)


class AdaptedPolicy(Policy):
    """A policy of which only adapters and `modules_to_save` are trained and saved.

    arguments: those of Policy.  base: hub id or folder of the frozen base.
    """

    def __init__(self, *arguments: object, settings: LoraConfig, base: str):
        super().__init__(*arguments)
        self.settings, self.base = settings, base

    def save(self, folder: Path, state: dict | None = None) -> None:
        """Write the fp32 adapters in PEFT's format, and the tokenizer.

        state: write these weights, a copy of an earlier `state_dict`, instead of the current ones.
        """
        tensors = {_peft_name(name): tensor for name, tensor in (state or self.state_dict())["masters"].items()}
        metadata = {"format": "pt"} | ({"quantize": "nf4"} if self.settings.quantize == "nf4" else {})
        save_file(tensors, folder / WEIGHTS, metadata=metadata)
        _sort_metadata(folder / WEIGHTS)
        settings = {key: getattr(self.settings, name) for key, name in PEFT_KEYS.items()}
        facts = {"task_type": "CAUSAL_LM", "base_model_name_or_path": self.base, "inference_mode": True}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(ALLOWED | facts | settings, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save_pretrained(folder)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which safetensors writes in random order: equal adapters are then equal
    files. A file begins with the length of its header, 8 bytes, and the header: JSON, padded with spaces."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, "the same entries in another order"
        file.seek(8)
        file.write(text)


def load(
    path: str,
    settings: LoraConfig | None = None,
    *,
    precision: str,
    device: torch.device,
    seed: int = 0,
    unquantized: bool = False,
) -> Policy:
    """A hub id or local folder -> Policy on `device`, with new adapters if settings.rank > 0.

    A folder in PEFT's format gives its base with the adapters found there; the base is in 4 bits if they were trained
    over such a one, except with `unquantized`.
    """
    folder = Path(path).expanduser()
    has_adapters = (folder / ADAPTER_CONFIG).is_file()
    if has_adapters:
        settings, base = read_config(folder)
        settings = replace(settings, quantize="none") if unquantized else settings
    elif settings and settings.rank:
        base = str(folder.resolve()) if folder.is_dir() else path
    else:
        return load_policy(path, precision=precision, device=device)
    precision = choose_precision(precision, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = load_model(base, dtype)
    add_adapters(model, settings, seed=seed, device=device)
    if has_adapters:
        read_weights(model, folder)
    tokenizer = from_hub(AutoTokenizer, path if (folder / "tokenizer_config.json").is_file() else base)
    return AdaptedPolicy(model.to(device).train(), tokenizer, precision, settings=settings, base=base)


def read_config(folder: Path) -> tuple[LoraConfig, str]:
    """Settings and base of a folder in PEFT's format. ValueError for PEFT features that are not supported here."""
    path = folder / ADAPTER_CONFIG
    found = json.loads(path.read_text(encoding="utf-8"))
    foreign = {key: value for key, value in found.items() if value and key not in {*PEFT_KEYS, *WITHOUT_EFFECT}}
    foreign = {key: value for key, value in foreign.items() if value != ALLOWED.get(key)}
    if isinstance(found.get("target_modules"), str):
        foreign["target_modules"] = found["target_modules"]  # a regular expression
    if foreign:
        raise ValueError(f"{path} asks for {foreign}, which is not supported here; merge the adapter with PEFT")
    base = found.get("base_model_name_or_path")
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise ValueError(f"{path}: base_model_name_or_path={base!r} is not a model; correct it there")
    settings = {name: found.get(key) for key, name in PEFT_KEYS.items()}
    names = {name: tuple(settings.pop(name) or ()) for name in ("target_modules", "modules_to_save")}
    with safe_open(folder / WEIGHTS, "pt") as file:  # PEFT's config has no key for it
        quantize = (file.metadata() or {}).get("quantize", "none")
    return LoraConfig(**settings, **names, quantize=quantize), base


@torch.no_grad()
def read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fill the trained parameters of `model` from a folder in PEFT's format. ValueError if names or shapes differ."""
    found = load_file(folder / WEIGHTS)
    expected = {_peft_name(name): tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    shapes = [{(name, *tensor.shape) for name, tensor in tensors.items()} for tensors in (expected, found)]
    if shapes[0] != shapes[1]:
        differing = sorted(shapes[0] ^ shapes[1])[:4]
        raise ValueError(f"{folder / WEIGHTS} does not fit its config and base; first differences: {differing}")
    for name, parameter in expected.items():
        parameter.copy_(found[name])


def _peft_name(name: str) -> str:
    """PEFT's name for one of our parameters, such as model.norm.weight or model.layers.0.mlp.up_proj.lora_A."""
    return f"base_model.model.{name}" + (".weight" if name.endswith((".lora_A", ".lora_B")) else "")


def write_merged(run: str, out: str) -> None:
    """Write a run's best (else last) checkpoint, or a folder in PEFT's format, to `out` as a plain model."""
    (folder, _), out = checkpoint.model_folder(run), Path(out).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; name a run or checkpoint with adapters")
    if not (folder / ADAPTER_CONFIG).is_file():
        if (folder / "config.json").is_file():
            raise ValueError(f"nothing to merge: it is a whole model already; load {folder}")
        raise ValueError(f"{folder} has no {ADAPTER_CONFIG}: nothing to merge; name a run or checkpoint with adapters")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name another folder")
    policy = load(str(folder), precision="fp32", device=torch.device("cpu"), unquantized=True)
    merge(policy.masters)
    dtype = load_model_config(policy.base).dtype or torch.float32
    policy.masters.to(dtype).save_pretrained(out)  # rounded once
    policy.tokenizer.save_pretrained(out)
    print(f"{folder} merged into {policy.base}: {out}")
    if read_config(folder)[0].quantize != "none":
        print("trained over a base in 4 bits, merged into the unrounded one: compare both with eval.py")


def main(argv: list[str] | None = None) -> int:
    """python -m grpo.lora merge RUN OUT. Returns the exit status: 2, after one line, for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m grpo.lora", description=__doc__.partition("\n")[0])
    command = parser.add_subparsers(required=True).add_parser("merge", help="write base and adapters as one model")
    command.add_argument("run", help="run folder (its best checkpoint, else its last) or a folder in PEFT's format")
    command.add_argument("out", help="folder to write, in Hugging Face layout")
    options = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    try:
        write_merged(options.run, options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
