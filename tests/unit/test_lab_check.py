"""`mule lab check`: planted modules, and what must be said of each."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mule.commands import lab_check
from mule.errors import UserError
from mule.lab import inspect as outside
from mule.lab._check_worker import CHECKS, examine
from mule.lab.inspect_build import build, load_class
from mule.lab.inspect_source import remarks
from tests.conftest import Mule

PLANTED = Path(__file__).resolve().parents[1] / "planted_modules"
GQA = "vocab_size=64 dim=32 n_layers=2 n_heads=4 n_kv_heads=2"
MOE = "vocab_size=64 n_embd=32 ff=48 num_experts=4 top_k=2 n_layer=2"
SMALL = "vocab_size=64 hidden_size=16 num_layers=1"
QUICK = tuple(name for name in CHECKS if name != "compile")


@cache
def _found(file: str, name: str, words: str, checks: tuple[str, ...]) -> dict[str, Any]:
    """Facts, findings and states of the checks, made in this process."""
    facts: dict[str, Any] = {}
    findings: list[dict[str, Any]] = []
    states: dict[str, str] = {}

    def tell(event: dict[str, Any]) -> None:
        states[event["check"]] = event["state"]
        facts.update(event.get("facts", {}))
        findings.extend({"check": event["check"], **one} for one in event.get("findings", []))

    settings = dict(lab_check._setting(word) for word in words.split())
    request = {"file": str(PLANTED / file), "name": name, "settings": settings, "checks": checks}
    examine(request, tell)
    return {"facts": facts, "findings": findings, "states": states}


def _faults(found: dict[str, Any]) -> list[str]:
    return [one["check"] for one in found["findings"] if one["level"] == "fault"]


def _one(found: dict[str, Any], check: str, part: str) -> dict[str, Any]:
    (one,) = (f for f in found["findings"] if f["check"] == check and part in f["found"])
    return one


def _line(file: str, mark: str) -> str:
    """The place of the line that is marked `# HERE: <mark>`."""
    lines = (PLANTED / file).read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.endswith(f"# HERE: {mark}"))
    return f"{file}:{number}"


# ---------------------------------------------------------------- what they can do


def test_a_plain_gpt_is_fit_and_what_it_lacks_is_said() -> None:
    found = _found("plain_gpt.py", "GPT", "n_layer=1", tuple(CHECKS))
    facts = found["facts"]
    assert not _faults(found)
    assert set(found["states"].values()) == {"ended"}
    assert facts["called_with"] == "ids, targets"  # without them it gives one position
    assert "only when targets are given" in _one(found, "forward", "logits")["found"]
    inside = 12 * 32 * 32 + 4 * 32 + 2 * 32  # attention and MLP, norms
    assert facts["total_params"] == facts["active_params"] == inside + (96 + 64) * 32
    assert facts["total_params_without_embeddings"] == inside + 64 * 32
    assert facts["tied_embeddings"] and not facts["moe"] and not facts["cache"]
    assert facts["causal"] and facts["proven_by"].startswith("gradients")
    assert (facts["attention"], facts["num_heads"], facts["num_kv_heads"]) == ("MHA", 2, 2)
    assert "enable_gqa=True" in _one(found, "attention", "MHA")["change"]
    assert "decoding recomputes" in _one(found, "cache", "no cache")["found"]
    assert facts["loss_falls"] and facts["ran_at"] == "1x1, 1x8, 3x24, 2x32"
    assert (facts["graphs"], facts["graph_breaks"], facts["recompiles_same_shape"]) == (1, 0, 0)
    assert facts["recompiles_other_shapes"] >= 1
    assert "train at one shape" in _one(found, "compile", "when B or T changed")["change"]


def test_grouped_queries_and_a_right_cache_are_seen() -> None:
    found = _found("gqa_cache.py", "Transformer", GQA, QUICK)
    facts = found["facts"]
    assert not _faults(found)
    assert facts["attention"] == "GQA, 2 query heads to a key head"
    assert (facts["query_rows"], facts["key_rows"], facts["num_kv_heads"]) == (32, 16, 2)
    assert facts["cache_arguments"] == "past_key_values, use_cache"
    assert facts["cached_equals_uncached"] and facts["cache_max_error"] < 1e-4
    assert not facts["tied_embeddings"]


def test_a_cache_that_forgets_its_positions_is_a_fault() -> None:
    found = _found("gqa_cache.py", "Late", GQA, ("forward", "cache"))
    assert _faults(found) == ["cache"]
    one = _one(found, "cache", "cached logits differ from uncached ones")
    assert "from the first token decoded alone" in one["found"]
    assert "positions that begin at 0 again" in one["change"]
    assert one["place"] == _line("gqa_cache.py", "cache")
    assert not found["facts"]["cached_equals_uncached"]


@pytest.mark.parametrize("name", ["InPositions", "ByPlaces", "MadeCache"])
def test_other_ways_to_cache_are_driven(name: str) -> None:
    found = _found("caches.py", name, "vocab_size=64 dim=32", ("forward", "cache"))
    assert not _faults(found)
    assert found["facts"]["cached_equals_uncached"], found


def test_experts_are_counted_by_what_one_token_uses() -> None:
    found = _found("moe_loop.py", "MoEModel", MOE, tuple(CHECKS))
    facts = found["facts"]
    assert not _faults(found)
    assert (facts["moe_layers"], facts["experts"], facts["experts_per_token"]) == (2, 4, 2)
    assert facts["router"] == "moe.0.router.weight" and facts["experts_at"] == "moe.0.experts"
    expert = 2 * 32 * 48
    assert facts["active_params"] == facts["total_params"] - 2 * 2 * expert


def test_a_loop_over_experts_breaks_the_graph_by_line() -> None:
    found = _found("moe_loop.py", "MoEModel", MOE, tuple(CHECKS))
    cut = _one(found, "compile", "graph break")
    assert cut["place"] == _line("moe_loop.py", "where")
    assert "F.grouped_mm" in cut["change"] and "left uncompiled" in cut["found"]
    again = _one(found, "compile", "compiled again")
    assert "size mismatch" in again["found"] and "of fixed size" in again["change"]
    assert _one(found, "operations", "nonzero")["place"] == _line("moe_loop.py", "where")
    assert _one(found, "operations", ".item()")["place"] == _line("moe_loop.py", "item")
    told = {one.line: one.kind for one in remarks(PLANTED / "moe_loop.py", ["MoE"])}
    assert told[int(_line("moe_loop.py", "print").partition(":")[2])] == "print"


def test_stacked_experts_are_counted_too() -> None:
    found = _found("caches.py", "Stacked", "vocab_size=64 dim=32", ("forward", "parameters"))
    facts = found["facts"]
    assert (facts["experts"], facts["experts_per_token"]) == (4, 1)
    assert facts["active_params"] == facts["total_params"] - 3 * 32 * 32


def test_a_leak_is_proven_and_its_line_named() -> None:
    found = _found("leaky.py", "LeakyModel", "vocab_size=64 emb_dim=32 n_layers=2", QUICK)
    assert _faults(found) == ["shapes", "causality"]
    one = _one(found, "causality", "not causal")
    assert "position 0 depend on the token at 1" in one["found"]
    assert "blocks.0 (Mixer)" in one["found"] and "is_causal=True" in one["change"]
    assert one["place"] == _line("leaky.py", "no mask")
    assert not found["facts"]["rows_apart"]
    assert "no BatchNorm" in _one(found, "shapes", "changes another's logits")["change"]


def test_torchs_own_layers_without_a_mask_are_named_where_they_are_called() -> None:
    found = _found("leaky.py", "Encoder", "", ("forward", "causality", "attention"))
    one = _one(found, "causality", "not causal")
    assert "encoder.layers.0.self_attn (MultiheadAttention)" in one["found"]
    assert one["place"] == _line("leaky.py", "torch's")
    assert "mask=nn.Transformer.generate_square_subsequent_mask(T)" in one["change"]
    assert (found["facts"]["attention"], found["facts"]["num_heads"]) == ("MHA", 4)


def test_a_choice_over_the_sequence_leaks_without_a_gradient() -> None:
    found = _found("caches.py", "LastDecides", "vocab_size=64 dim=32", ("forward", "causality"))
    assert "though no gradient flows" in _one(found, "causality", "later tokens change")["found"]


# ---------------------------------------------------------------- what breaks


def test_odd_lines_are_named() -> None:
    found = _found("breaks_down.py", "Odd", SMALL, ("forward", "operations"))
    assert not _faults(found)
    assert _one(found, "operations", "float64")["place"] == _line("breaks_down.py", "float64")
    buffer = _one(found, "operations", "writes to buffers in training: seen")
    assert buffer["place"] == _line("breaks_down.py", "buffer")
    assert "no cache in training" in buffer["change"]


@pytest.mark.slow
def test_a_counter_is_compiled_again_at_every_call() -> None:
    found = _found("breaks_down.py", "Odd", SMALL, ("forward", "compile"))
    again = _one(found, "compile", "compiled again 2 times for the same B and T")
    assert "self.calls" in again["found"] and again["place"] == _line("breaks_down.py", "counter")


def test_an_activation_changed_in_place_is_named() -> None:
    found = _found("breaks_down.py", "InPlace", SMALL, ("forward", "training", "causality"))
    one = _one(found, "training", "changed in place")
    assert one["place"] == _line("breaks_down.py", "in place") and "x = x + y" in one["change"]
    assert _one(found, "causality", "not measured")["change"] == "see training"


def test_what_is_no_logits_is_a_fault() -> None:
    found = _found("breaks_down.py", "Probabilities", SMALL, ("forward",))
    assert "every row adds up to 1" in _one(found, "forward", "probabilities")["found"]
    found = _found("breaks_down.py", "Hidden", SMALL, tuple(CHECKS))
    one = _one(found, "forward", "forward gives a tensor (2, 16)")
    assert "return logits (B, T, V)" in one["change"]
    assert list(found["states"]) == ["build", "forward"]  # the rest needs logits


def test_a_loss_that_does_not_fall_is_a_fault() -> None:
    found = _found("breaks_down.py", "Frozen", SMALL, ("forward", "training", "parameters"))
    assert ".detach()" in _one(found, "training", "does not fall")["change"]
    assert "embed.weight" in _one(found, "parameters", "no gradient reaches")["found"]


def test_a_fixed_size_is_named_by_line() -> None:
    found = _found("breaks_down.py", "OneSize", SMALL, ("forward", "shapes"))
    one = _one(found, "shapes", "fails for ids (3, 24)")
    assert one["place"] == _line("breaks_down.py", "one size")
    assert "take B and T from the ids' shape" in one["change"]


def test_what_their_file_raises_is_a_finding() -> None:
    found = _found("breaks_down.py", "Exits", SMALL, QUICK)
    one = _one(found, "build", "it calls sys.exit")
    assert one["place"] == _line("breaks_down.py", "exit") and "__main__" in one["change"]
    found = _found("breaks_down.py", "Nothing", SMALL, QUICK)
    assert "no class is called Nothing" in found["findings"][0]["found"]
    assert "Plain, Dies" in found["findings"][0]["change"]


# ---------------------------------------------------------------- how it is built


@pytest.mark.parametrize(
    ("file", "name", "words", "missing"),
    [
        ("gqa_cache.py", "Late", "dim=32", "vocab_size, n_layers, n_heads, n_kv_heads"),
        ("leaky.py", "LeakyModel", "", "emb_dim, n_layers, vocab_size"),
        ("moe_loop.py", "MoEModel", "ff=8", "n_embd, n_layer, num_experts, top_k, vocab_size"),
        ("breaks_down.py", "Plain", "dropout=0", "vocab_size, hidden_size, num_layers"),
    ],
)
def test_what_is_missing_is_named_with_values_to_try(
    file: str, name: str, words: str, missing: str
) -> None:
    (one,) = _found(file, name, words, QUICK)["findings"]
    assert one["found"] == f"{name} cannot be built without {missing}"
    again = _found(file, name, f"{words} {one['change']}", ("forward",))
    assert again["states"]["build"] == "ended", again  # the values it tells do build it


def test_a_strange_setting_is_refused() -> None:
    (one,) = _found("plain_gpt.py", "GPT", "n_layers=2", QUICK)["findings"]
    assert "n_layers is no argument of GPT nor of its config" in one["found"]
    assert one["change"] == "did you mean n_layer=...?"


def test_settings_are_read_as_python_writes_them() -> None:
    told = [lab_check._setting(word) for word in ("a=2", "b=1e-3", "c=true", "d=gelu", "e=(1, 2)")]
    assert told == [("a", 2), ("b", 1e-3), ("c", True), ("d", "gelu"), ("e", (1, 2))]
    with pytest.raises(UserError, match="`n_layer` is no setting"):
        lab_check._setting("n_layer")


def test_a_file_without_a_class_lists_them() -> None:
    with pytest.raises(UserError, match=r"which class\? It defines CausalSelfAttention") as caught:
        lab_check.run(str(PLANTED / "plain_gpt.py"), [])
    assert caught.value.hint.endswith("plain_gpt.py:GPT")
    with pytest.raises(UserError, match="no such Python file"):
        lab_check.run("nothing.py:GPT", [])


# ---------------------------------------------------------------- the process


def _plant(monkeypatch: pytest.MonkeyPatch, *checks: str) -> None:
    """Only these checks, so that a test takes seconds."""
    about = {name: outside.CHECKS[name] for name in checks}
    monkeypatch.setattr(outside, "CHECKS", about)


@pytest.mark.slow
def test_a_crash_and_a_loop_take_nothing_down(
    monkeypatch: pytest.MonkeyPatch, mule_cli: Mule
) -> None:
    """The checks after a crash are made by another process."""
    _plant(monkeypatch, "forward", "shapes", "cache")
    module = f"{PLANTED / 'breaks_down.py'}:DiesAndLoops"
    code, out, _ = mule_cli("lab", "check", module, *SMALL.split(), "--limit-s", "3", "--json")
    result = json.loads(out.splitlines()[-1])
    assert code == 1 and result["verdict"] == "FIX FIRST"
    assert result["settings"]["hidden_size"] == 16
    died, endless = (one for one in result["findings"] if one["level"] == "fault")
    assert died["found"] == "the process died of SIGABRT in the check of shapes"
    assert died["place"] == _line("breaks_down.py", "abort")
    assert endless["found"].startswith("no end after 3 s in the check of cache")
    assert "--limit-s 900" in endless["change"]
    head = int(_line("breaks_down.py", "endless").partition(":")[2])
    assert endless["place"] in (f"breaks_down.py:{head}", f"breaks_down.py:{head + 1}")
    outcomes = {one["check"]: one["outcome"] for one in result["checks"]}
    assert outcomes == {"forward": "good", "shapes": "fault", "cache": "fault"}


def test_what_is_missing_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, mule_cli: Mule) -> None:
    found = _found("leaky.py", "LeakyModel", "n_layers=1", QUICK)
    monkeypatch.setattr(outside, "examine", lambda *_, **__: found)
    code, _, err = mule_cli("lab", "check", f"{PLANTED / 'leaky.py'}:LeakyModel", "n_layers=1")
    assert code == 2 and "LeakyModel cannot be built without emb_dim, vocab_size" in err
    said = " ".join(err.split())
    assert "give them, for example: mule lab check" in said
    assert said.endswith("leaky.py:LeakyModel n_layers=1 emb_dim=64 vocab_size=256")


def test_the_page_names_lines_and_changes(mule_cli: Mule, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _found("moe_loop.py", "MoEModel", MOE, tuple(CHECKS))
    report = {"facts": found["facts"], "findings": found["findings"], "checks": []}
    monkeypatch.setattr(outside, "examine", lambda *_, **__: report)
    code, out, _ = mule_cli("lab", "check", f"{PLANTED / 'moe_loop.py'}:MoEModel")
    assert code == 0 and out.startswith("WORKS, WITH WARNINGS")
    assert "4 in 2 layers, 2 a token (found by gradients at moe.0.experts)" in out
    assert f"{_line('moe_loop.py', 'where')}  graph break: " in out
    assert "Costs speed or a feature" in out and "-> " in out


@pytest.mark.slow
def test_a_process_that_ends_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(monkeypatch, "forward")
    result = lab_check.run(f"{PLANTED / 'breaks_down.py'}:Ends", SMALL.split())
    (one,) = result["findings"]
    assert one["found"] == "the process ended by itself (code 0) in the check of build"
    assert result["checks"][0]["outcome"] == "not reached"


# ---------------------------------------------------------------- what docs/lab.md shows

STATIC = "vocab_size=64 dim=32 n_layers=2 n_heads=4 n_kv_heads=2 max_tokens=64"


def test_the_static_cache_of_the_page_has_no_fault() -> None:
    found = _found("static_cache.py", "Decoder", STATIC, QUICK)
    assert not found["findings"]
    facts = found["facts"]
    assert facts["cached_equals_uncached"] and facts["cache_arguments"] == "input_pos, cache"
    assert facts["tied_embeddings"] and facts["attention"] == "GQA, 2 query heads to a key head"


@pytest.mark.slow
def test_the_static_cache_of_the_page_is_two_graphs() -> None:
    """One of the prompt and one of a token, whatever the length of the text."""
    from mule.train.compiler import Watch

    module, make = load_class(PLANTED / "static_cache.py", "Decoder")
    words = dict(lab_check._setting(word) for word in STATIC.split())
    watch, model = Watch(), build(module, make, words).eval()
    compiled, cache = torch.compile(model, backend="eager"), model.new_cache(1, 64)
    with torch.no_grad():
        compiled(torch.zeros(1, 8, dtype=torch.int64), torch.arange(8), cache)
        for place in range(8, 14):
            compiled(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([place]), cache)
    made = watch.look()
    assert len(made.graphs) == 2 and not made.breaks


def test_the_page_shows_that_file() -> None:
    page = (PLANTED.parents[1] / "docs" / "lab.md").read_text()
    source = (PLANTED / "static_cache.py").read_text()
    shown = page.partition("```python\n")[2].partition("```")[0]
    assert shown.strip() and shown in source
