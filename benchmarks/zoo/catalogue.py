"""Look for further names in the libraries: those whose plain step runs here and is small.

    python -m benchmarks.zoo.catalogue [FAMILY ...]

Prints them by family, as `names.toml` has them.  A name stays out whose model has more than 40 million parameters, or
needs what is not installed, or options that its family's rules do not give it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise

from benchmarks.zoo.families import families
from benchmarks.zoo.limited import Limits, preload, run_limited

MOST_PARAMETERS = 40_000_000
MOST_STEP_S = 4.0
LIMITS = Limits(seconds=30, memory_bytes=4 << 30)
#: Of each of timm's modules.
_TIMM_EACH = 2

_MOE = re.compile(r"moe|mixtral|switch|deepseek|dbrx|gpt_oss|flex_olmo|phimoe|longcat|jetmoe")
_STATE_SPACE = re.compile(
    r"mamba|rwkv|bamba|jamba|zamba|falcon_h1|nemotron_h|recurrent_gemma|lfm2$|xlstm|qwen3_next|olmo_hybrid|kimi|hybrid"
)


def runs(family: str, name: str, tell: Callable[[str], None]) -> None:
    """Tell nothing if the name can be in the zoo, else why not."""
    import time

    from benchmarks.zoo.row import Row, make

    subject = make(Row(family=family, name=name))
    count = sum(p.numel() for p in subject.module.parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters")
    begin = time.process_time()
    for _, loss in subject.run():
        if not bool(loss.isfinite()):
            raise ValueError(f"its loss is {float(loss)}")
    if time.process_time() - begin > MOST_STEP_S:
        raise ValueError(f"a step takes {time.process_time() - begin:.1f} s")
    tell(f"{count:,} parameters")


def candidates(family: str) -> Iterable[list[str]]:
    """Names in groups: of each group at most `_TIMM_EACH` are wanted, of a group of one that one."""
    if family == "timm":
        import timm

        for module in timm.list_modules():
            names = [name for name in timm.list_models(module=module) if not name.startswith("test_")]
            yield sorted(names, key=lambda name: (_size(name), len(name), name))[:5]
        return
    for name in _single(family):
        yield [name]


def _single(family: str) -> Iterable[str]:
    import torchvision.models as vision

    if family.startswith("torchvision-"):
        kind = family.partition("-")[2]
        return vision.list_models(module=vision if kind == "classification" else getattr(vision, kind))
    if family.startswith("transformers-"):
        return _transformers(family.partition("-")[2])
    if family == "diffusers":
        from benchmarks.zoo.families.diffusion import _MAKERS

        return _MAKERS
    if family == "monai":
        from benchmarks.zoo.families.medical import _NETWORKS

        return _NETWORKS
    if family == "torch-geometric":
        from torch_geometric.nn import conv

        whole = ("GCN", "GraphSAGE", "GIN", "GAT", "EdgeCNN", "PNA", "GraphUNet", "AttentiveFP", "SchNet")
        return [*whole, *(name for name in conv.__all__ if name.endswith("Conv"))]
    if family == "adapters":
        kinds = ("lora", "dora", "ia3", "loha", "lokr", "adalora", "vera", "oft", "boft", "prefix", "prompt")
        return [f"full-{kind}" for kind in kinds] + [
            f"{base}-{kind}" for base in ("nf4", "int8", "torchao8") for kind in ("lora", "dora", "ia3", "prompt")
        ]
    nets = (
        "resnet18",
        "mobilenetv3_small_050",
        "convnext_atto",
        "levit_128s",
        "resnet10t",
        "efficientvit_b0",
        "vit_tiny_patch16_224",
    )
    if family == "two-networks":
        return [
            "contrastive/",
            *(f"adversarial/{net}" for net in nets),
            *(f"distilled/{one}+{other}" for one, other in pairwise(nets)),
            *(f"momentum/{net}" for net in nets),
        ]
    return [
        *(f"gradient-penalty/{net}" for net in nets),
        *(f"meta/{net}" for net in nets),
        *(f"physics/{width}" for width in (32, 64)),
        "forces/SchNet",
        *(f"smooth/monai/{net}" for net in ("UNet", "SegResNet", "BasicUNet", "AutoEncoder")),
    ]


def _transformers(kind: str) -> Iterable[str]:
    from transformers.models.auto import modeling_auto as auto

    def of(task: str) -> list[str]:
        return list(getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))

    causal = of("CAUSAL_LM")
    return {
        "causal": [name for name in causal if not _MOE.search(name) and not _STATE_SPACE.search(name)],
        "moe": [name for name in causal if _MOE.search(name)],
        "state-space": [name for name in causal if _STATE_SPACE.search(name)],
        "masked": of("MASKED_LM"),
        "seq2seq": of("SEQ_TO_SEQ_CAUSAL_LM"),
        "vision": of("IMAGE_CLASSIFICATION"),
        "audio": [*of("AUDIO_CLASSIFICATION"), "speech_to_text", "moonshine"],
    }[kind]


def _size(name: str) -> int:
    hints = (
        r"atto|femto|pico|nano|xxs|xxtiny|tiny|050|035",
        r"_t\d*(_|$)|mini|_xs|xsmall|small|_s(_|$)|s0|b0|18|10t|_m0",
        r"26|34|50|base",
    )
    return next((place for place, hint in enumerate(hints) if re.search(hint, name)), len(hints))


def main() -> None:
    preload()
    for family in sys.argv[1:] or families():
        print(f"{family} = [", flush=True)
        for group in candidates(family):
            found = 0
            for name in group:
                ended = run_limited(runs, family, name, limits=LIMITS)
                if ended.failure:
                    print(f"  {family} {name}: {ended.failure}", file=sys.stderr, flush=True)
                    continue
                print(f'  "{name}",', flush=True)
                found += 1
                if found == _TIMM_EACH:
                    break
        print("]", flush=True)


if __name__ == "__main__":
    main()
