"""What methods are called: on pages, in tables, in sentences.

In `evaluation.json` methods have the names below; in `comparison.json` also those of `methods.py`, with `-off` behind a
router without its attention LoRA and `-on` behind one that was given the first method's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedcompose_coordinator.methods import METHODS

OFF, ON = "-off", "-on"
TITLES = {
    "composed": "Composed model",
    "best_single": "Best single expert",
    "oracle": "Own expert",
    "uniform": "Uniform merge",
    "random_router": "Random router",
    "attention_only": "Attention LoRA alone",
    "base": "Base model",
    "own_expert": "Own expert",
}
EXPLAINED = {
    "composed": "router and attention LoRA, as it would be released",
    "best_single": "the expert with the best mean, chosen on these very prompts, which flatters it",
    "oracle": "told each prompt's domain; of a mixed prompt that of its first question",
    "uniform": "the mean of all experts' updates, no router, no attention LoRA",
    "random_router": "a random expert for each token and place, no attention LoRA",
    "attention_only": "the attention LoRA trained on the same data without any expert",
    "base": "the untouched base model",
}
IN_SENTENCE = {
    "base": "the base",
    "uniform": "the uniform merge",
    "random_router": "the random router",
    "attention_only": "the attention LoRA alone",
    "best_single": "the best single expert",
    "own_expert": "each domain's own expert",
    "oracle": "each domain's own expert",
    "prompt": "routing whole prompts",
    "soft": "soft routing",
}
CONTROLS = ("oracle", "best_single", "uniform", "random_router", "attention_only", "base")


def title(name: str, first: str = "") -> str:
    """`first` is the method whose attention LoRA others were given."""
    if variant(name, first):
        return f"{title(name.removesuffix(OFF).removesuffix(ON))}, {variant(name, first)}"
    if name.startswith("expert:"):
        return f"Expert {name.removeprefix('expert:')}"
    return TITLES.get(name, name)


def variant(name: str, first: str) -> str:
    """What distinguishes a variant from the method above it; empty for a method itself."""
    if name.endswith(ON):
        return f"with the attention LoRA of {first}"
    return "without attention LoRA" if name.endswith(OFF) else ""


def explained(name: str) -> str:
    """One line on what a method does; empty for a variant, whose title says it."""
    if name.startswith("expert:"):
        return f"the LoRA of {name.removeprefix('expert:')}, frozen"
    return METHODS[name].says if name in METHODS and name not in EXPLAINED else EXPLAINED.get(name, "")


def in_sentence(name: str, first: str = "") -> str:
    return IN_SENTENCE.get(name) or title(name, first)


def compared(names: Iterable[str], first: str) -> list[str]:
    """The rows of a comparison in order: the first method, the others, then the controls; each before its variant."""
    present = set(names)
    experts = sorted(name for name in present if name.startswith("expert:"))
    methods = [name for name in METHODS if name not in CONTROLS]
    wanted: Sequence[str] = [first, *methods, *CONTROLS[:2], *experts, *CONTROLS[2:]]
    rows = [name + ending for name in dict.fromkeys(wanted) for ending in ("", OFF, ON)]
    return [name for name in rows if name in present]
