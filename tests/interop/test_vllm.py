"""vLLM with our plugin gives the greedy tokens that we give, and others where the routing is another.

It lives in an environment of its own, named by FEDCOMPOSE_VLLM_PYTHON: `make interop-vllm` makes it, with a third-party
build of vLLM for CPUs, and runs this. FEDCOMPOSE_VLLM_RELEASE names a release to be tried as well, say the demo's.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fedcompose.bases import Base, resolve_base
from fedcompose.model.composed import load_release
from fedcompose.model.for_vllm import EXPERTS_FILE, export_vllm
from fedcompose.model.lm import prompt_ids
from fedcompose.release import ReceivedRelease, VerifiedRelease
from fedcompose.routing import RouterConfig
from fedcompose.serve.bench import questions
from fedcompose.standing import verify_for_use
from tests.federation_sim import ATTENTION, make_federation
from tests.tiny import make_tiny_base
from tests.tiny_experts import make_tiny_expert

PYTHON = os.environ.get("FEDCOMPOSE_VLLM_PYTHON")
RELEASE = os.environ.get("FEDCOMPOSE_VLLM_RELEASE")
HOME = os.environ.get("FEDCOMPOSE_HOME")  # before every test gets one of its own
HIDDEN = 128  # vLLM's attention on CPUs wants heads of 32 and more
TOKENS = 24
PROMPTS = [
    torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (2, 3, 5, 8, 13, 21, 34, 55, 89, 144)
]
ASK = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    llm = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=4)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = llm.generate(asked, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    print("TOKENS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="FEDCOMPOSE_VLLM_PYTHON is not set: `make interop-vllm`"),
]


def ours(release: VerifiedRelease, base: Base, prompts: Sequence[list[int]]) -> tuple[list[list[int]], set[int]]:
    """Our greedy tokens, one prompt at a time, and the experts that spoke."""
    model, _ = load_release(release, torch.float32, base)
    model.generation_config.eos_token_id = None  # to the end, past the end of a turn
    said, spoke = [], set[int]()
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with model.routing.recording() as record:
            rows = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, repetition_penalty=1.0, max_new_tokens=TOKENS
            )
        said.append(rows[0, len(prompt) :].tolist())
        spoke |= {expert for call in record.choices for expert in call.unique().tolist()}
    return said, spoke


def vllms(folder: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = folder.parent / "ask.py"
    script.write_text(ASK)
    result = subprocess.run(
        [str(PYTHON), str(script), str(folder), json.dumps(prompts), str(TOKENS)],
        capture_output=True, text=True, check=False, env=environment | quiet,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("TOKENS ")]
    found: list[list[int]] = json.loads(line.removeprefix("TOKENS "))
    return found


def turn_the_routers(folder: Path) -> None:
    """Every decision is now another's."""
    path = folder / EXPERTS_FILE
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(".router"):
            tensors[name] = tensors[name].roll(1, 0).contiguous()
    save_file(tensors, path)


def test_vllm_gives_our_greedy_tokens_and_others_by_another_routing(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", hidden=HIDDEN)
    experts = {site: make_tiny_expert(base, tmp_path / site, seed) for seed, site in enumerate(("site-a", "site-b"))}
    experts["attention"] = make_tiny_expert(base, tmp_path / "attention", seed=3, target_modules=ATTENTION)
    sim = make_federation(tmp_path / "federation", base, experts)
    release = sim.released(RouterConfig(sharing="layer", bias=True))  # the default kind
    export_vllm(release, sim.base, tmp_path / "out")

    expected, spoke = ours(release, sim.base, PROMPTS)
    assert spoke == {0, 1}, "one expert alone would not test it"
    assert vllms(tmp_path / "out", PROMPTS) == expected

    turn_the_routers(tmp_path / "out")
    turned = vllms(tmp_path / "out", PROMPTS)
    assert sum(each != said for each, said in zip(turned, expected, strict=True)) > len(PROMPTS) / 2


@pytest.mark.skipif(not RELEASE, reason="FEDCOMPOSE_VLLM_RELEASE names no release")
def test_vllm_gives_our_greedy_tokens_on_a_real_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if HOME is None:
        monkeypatch.delenv("FEDCOMPOSE_HOME")
    else:
        monkeypatch.setenv("FEDCOMPOSE_HOME", HOME)
    release = verify_for_use(ReceivedRelease(Path(str(RELEASE))), None)
    base = resolve_base(release.composition["base"]["name"])
    export_vllm(release, base, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(base.path, local_files_only=True)
    prompts = [prompt_ids(tokenizer, question) for question in questions(12)]

    expected, spoke = ours(release, base, prompts)
    assert spoke == set(range(len(release.experts))), "not every expert was asked for"
    assert vllms(tmp_path / "out", prompts) == expected
