"""`mule convert`: names, shapes, types, proof; and pickle files that mean harm."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mule import fsio
from mule.adapters.source import find_source
from mule.commands.convert import Shape, run
from mule.errors import CheckFailed, ModelError, UserError
from mule.models import _unpickle_worker as worker
from mule.models import conversion, folder, pickled
from mule.models.config import ModelConfig
from mule.models.families import family
from mule.models.folder import load_model, model_state, read_config
from mule.models.foreign import canonical
from mule.models.pickled import Limits, unpickle
from mule.tokenizer import Tokenizer
from tests.conftest import Mule
from tests.parity.tiny_pairs import reference_model, token_ids
from tests.tiny import TINY, tiny_model

State = dict[str, torch.Tensor]

LLAMA = replace(TINY, family="llama", qk_norm=False, tie_embeddings=False)
HEADS = Shape(settings=("model.num_heads=4",))
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
KV_HEADS = ("model.num_kv_heads=2", "model.head_dim=10")
K0 = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """The worker's answers without its process, which takes seconds to start; the real starter."""
    monkeypatch.chdir(tmp_path)
    original = pickled._run_child

    def answer(request: bytes, _: int) -> subprocess.CompletedProcess[bytes]:
        text = json.dumps(worker.answer(json.loads(request)))
        return subprocess.CompletedProcess([], 0, text.encode(), b"")

    monkeypatch.setattr(pickled, "_run_child", answer)
    return original


def weights(config: ModelConfig = LLAMA) -> State:
    return model_state(tiny_model(config))


def saved(content: Any, name: str = "model.pt") -> Path:
    torch.save(content, name)
    return Path(name)


def assert_equal(out: Path, state: State) -> None:
    written = model_state(load_model(out))
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name].float()) for name in state)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model._orig_mod."])
def test_a_wrapped_tied_model_is_found_beside_its_optimizer(prefix: str) -> None:
    state = {f"{prefix}{name}": t for name, t in tiny_model().state_dict().items()}
    assert f"{prefix}lm_head.weight" in state  # tied: the embedding under a second name
    file = saved({"model": state, "optimizer": {"state": {0: torch.ones(3, 4)}}, "step": 70})
    report = run(file, Path("out"))
    assert_equal(Path("out"), weights(TINY))
    fsio.verify_folder("out")
    assert (report["weights"], report["bit_identical"], report["rounded"]) == (35, 35, 0)
    assert report["left_out"] == {"optimizer": "dict of 1", "step": "70"}
    assert report["state_dict"] == "model" and report["family"] == "qwen3"
    assert read_config("out") == replace(TINY, max_position_embeddings=1024)
    assert report["next"] == "mule train RECIPE model.path=out tokenizer.path=FOLDER"


def test_names_lose_their_wrappers_anywhere() -> None:
    layer = "model.layers.3._orig_mod.mlp._checkpoint_wrapped_module.up_proj.weight"
    assert canonical(layer) == "model.layers.3.mlp.up_proj.weight"
    assert canonical("layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert canonical("model.model.norm.weight") == canonical("norm.weight") == "model.norm.weight"
    assert canonical("model.lm_head.weight") == "lm_head.weight"


def test_two_models_in_one_are_not_mixed() -> None:
    state = weights()
    with pytest.raises(ModelError, match=f"module.{K0} and {K0} are both"):
        run(saved(state | {f"module.{K0}": state[K0] + 1}), Path("out"), shape=HEADS)
    run(saved(state | {f"module.{K0}": state[K0].clone()}), Path("out"), shape=HEADS)
    assert_equal(Path("out"), state)


def test_fused_matrices_are_cut() -> None:
    fused = weights()
    for number in range(LLAMA.num_layers):
        for whole, names in FUSED.items():
            rows = [fused.pop(f"model.layers.{number}.{name}.weight") for name in names]
            fused[f"model.layers.{number}.{whole}.weight"] = torch.cat(rows)
    report = run(saved(fused), Path("out"), shape=HEADS)
    assert_equal(Path("out"), weights())
    assert report["bit_identical"] == report["weights"] == 30


@pytest.mark.parametrize("case", ["qwen2", "gemma3", "phi3-long", "granite-bias"])
def test_other_families_are_converted_by_their_config(case: str) -> None:
    reference = reference_model(case)
    reference.config.save_pretrained("config")
    report = run(
        saved(reference.state_dict()), Path("out"), shape=Shape(config=Path("config/config.json"))
    )
    assert report["bit_identical"] == report["weights"]
    ids = token_ids(1, 20)
    torch.testing.assert_close(load_model("out")(ids), reference(ids).logits, atol=1e-4, rtol=0)


def test_several_state_dicts_are_named() -> None:
    ema = {name: tensor + 1 for name, tensor in weights().items()}
    file = saved({"model": weights(), "ema": ema})
    with pytest.raises(ModelError, match="holds 2 state dicts: model, ema") as caught:
        run(file, Path("out"), shape=HEADS)
    assert caught.value.hint == "say which: --key NAME"
    run(file, Path("out"), shape=HEADS, key="ema")
    assert_equal(Path("out"), ema)
    with pytest.raises(ModelError, match="no state dict is called emma; found: model, ema"):
        run(file, Path("out"), shape=HEADS, key="emma")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "transformer.wte.weight",
            "GPT-2 or nanoGPT, which mule convert does not read:\n  transformer",
        ),
        ("layers.0.attention.wq.weight", "Meta's own layout"),
        ("base_model.model.layers.0.q.lora_A.weight", "a LoRA adapter"),
        ("encoder.block.weight", "no tensor is called model.layers.0...; there are:\n  encoder"),
    ],
)
def test_another_architecture_is_named(name: str, says: str) -> None:
    with pytest.raises(ModelError, match=r"model\.pt: ") as caught:
        run(saved({name: torch.ones(3, 4)}), Path("out"))
    assert says in caught.value.message


# ---------------------------------------------------------------- shape


def test_heads_are_asked_for_and_a_misfit_is_listed() -> None:
    state = weights()
    with pytest.raises(ModelError, match="do not tell how many attention heads") as caught:
        run(saved(state), Path("out"))
    assert "model.num_heads=N or model.head_dim=N (their product is 40)" in caught.value.hint
    del state["model.norm.weight"]
    state["model.layers.0.mlp.bias"] = torch.ones(2)
    state[K0] = state[K0][:7]
    with pytest.raises(ModelError, match="3 tensors do not fit") as caught:
        run(saved(state), Path("out"), shape=Shape(settings=("model.num_heads=4", *KV_HEADS)))
    assert caught.value.message.split("\n  ")[1:] == [
        f"{K0}: (7, 24), the config says (20, 24)",
        "model.layers.0.mlp.bias: (2,), not in this model",
        "model.norm.weight: missing",
    ]
    assert not Path("out").exists()


def test_long_lists_end_after_ten() -> None:
    state = {name: tensor for name, tensor in weights().items() if "mlp" not in name}
    shape = Shape(settings=(*HEADS.settings, "model.intermediate_size=40", *KV_HEADS))
    state |= {f"extra.{number}": torch.ones(1) for number in range(9)}
    with pytest.raises(ModelError, match=r"18 tensors do not fit") as caught:
        run(saved(state), Path("out"), shape=shape)
    assert caught.value.message.endswith("and 8 more")


def test_the_config_is_taken_from_beside_or_named_or_like_another(tmp_path: Path) -> None:
    raw = family("llama").to_hf(LLAMA) | {"quantization_config": {"quant_method": "fp8"}}
    Path("other.json").write_text(json.dumps(raw))
    file = saved(weights())
    assert run(file, Path("named"), shape=Shape(Path("other.json")))["shape_from"] == "other.json"
    Path("config.json").write_text(json.dumps(raw))
    assert run(file, Path("beside"))["shape_from"] == "config.json"
    assert run(file, Path("like"), shape=Shape(like="named"))["shape_from"] == "named"
    assert read_config("named") == read_config("beside") == read_config("like") == LLAMA
    Path("r.yaml").write_text("model: {family: llama, num_heads: 4, rope_theta: 500.0}\n")
    run(file, Path("recipe"), shape=Shape(like="r.yaml"))
    assert read_config("recipe").rope_theta == 500.0
    with pytest.raises(UserError, match="cannot take effect"):
        run(file, Path("x"), shape=Shape(Path("other.json"), settings=HEADS.settings))
    with pytest.raises(UserError, match="cannot take effect"):
        run(file, Path("x"), shape=Shape(like="named", settings=HEADS.settings))
    with pytest.raises(ModelError, match="tensors do not fit"):
        run(file, Path("x"), shape=Shape(settings=("model.size=1m",)))


# ---------------------------------------------------------------- types


def test_types_are_kept_or_chosen() -> None:
    half = {name: tensor.bfloat16() for name, tensor in weights().items()}
    report = run(saved(half), Path("out"), shape=HEADS)
    assert (report["dtype"], report["bit_identical"]) == ("bfloat16", 30)
    report = run(saved(half), Path("out"), shape=HEADS, dtype="fp32")  # widened, which is exact
    assert (report["dtype"], report["bit_identical"]) == ("float32", 30)
    report = run(saved(weights()), Path("out"), shape=HEADS, dtype="bf16")
    assert report["bit_identical"] + report["rounded"] == 30 and report["rounded"] >= 21
    assert 1e-4 < report["greatest_difference"] <= 2**-8
    with pytest.raises(UserError, match="--dtype int4: no such type"):
        run(saved(half), Path("out"), shape=HEADS, dtype="int4")


@pytest.mark.parametrize(("suffix", "shape"), [("_scale", ()), ("_scale_inv", (20, 1))])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_dequantised(kind: torch.dtype, suffix: str, shape: tuple[int, ...]) -> None:
    state = {name: tensor.bfloat16() for name, tensor in weights().items()}
    exact = state[K0].float()
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(5)) * 0.01 + 0.01
    state[K0] = (exact / scale).to(kind)
    state[K0 + suffix] = scale
    state[K0.replace("weight", "input_scale")] = torch.ones(())
    report = run(saved(state), Path("out"), shape=HEADS)
    found = load_model("out").get_parameter(K0)
    assert (found - exact).abs().max() < 0.13 * exact.abs().max()  # e5m2 rounds by an eighth
    assert torch.equal(found, (state[K0].float() * scale).bfloat16().float())
    assert (report["dtype"], report["bit_identical"], report["rounded"]) == ("bfloat16", 29, 1)
    assert list(report["left_out"].values()) == ["not a weight"]


def test_float8_without_a_scale_is_exact_in_bf16() -> None:
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights().items()}
    report = run(saved(state), Path("out"), shape=HEADS)
    assert (report["dtype"], report["bit_identical"]) == ("bfloat16", 30)
    assert_equal(Path("out"), state)


def test_blocks_of_128_have_their_own_scale() -> None:
    weight = torch.randn(300, 200).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2)
    expected = weight.float()
    for row, column in ((0, 0), (127, 199), (128, 127), (299, 128)):
        value = expected[row, column] * scale[row // 128, column // 128]
        assert conversion.dequantised(weight, scale)[row, column] == value
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        conversion.dequantised(weight, scale.T.contiguous())


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    state = weights()
    state[K0][1, 2] = torch.nan
    with pytest.raises(ModelError, match=f"{K0} holds NaN or infinite values"):
        run(saved(state), Path("out"), shape=HEADS)
    state[K0][1, 2] = 70_000
    with pytest.raises(ModelError, match=rf"{K0} holds values up to 7e\+04, beyond torch.float16"):
        run(saved(state), Path("out"), shape=HEADS, dtype="fp16")
    state[K0][1, 2] = 0
    state[K0] = state[K0].to(torch.int8)
    with pytest.raises(ModelError, match=f"{K0}: int8, not a type for weights"):
        run(saved(state), Path("out"), shape=HEADS)
    assert not Path("out").exists()


# ---------------------------------------------------------------- proof, tokenizer, hints


def test_a_changed_weight_is_found_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    original = folder.save_model

    def spoiled(state: State, *args: Any, **options: Any) -> None:
        state[K0][0, 0] += 0.001
        original(state, *args, **options)

    monkeypatch.setattr(folder, "save_model", spoiled)
    with pytest.raises(CheckFailed, match=rf"{K0} differs by 0\.001"):
        run(saved(weights()), Path("out"), shape=HEADS)
    assert [path.name for path in Path().iterdir()] == ["model.pt"]


def test_the_tokenizer_goes_along() -> None:
    Tokenizer.train(["a b c"], 260).save(Path("tok"))
    with pytest.raises(UserError, match="260 tokens, the model has 89"):
        run(saved(weights()), Path("out"), shape=HEADS, tokenizer=Path("tok"))
    state = weights(replace(LLAMA, vocab_size=261))
    report = run(saved(state), Path("out"), shape=HEADS, tokenizer=Path("tok"))
    tokenizer = Tokenizer.load("out")
    assert tokenizer.vocab_size == 260 and report["next"].endswith(" out")
    assert fsio.read_json("out/config.json")["eos_token_id"] == list(tokenizer.stop_ids)


def test_elsewhere_a_pickle_is_refused_with_this_command() -> None:
    with pytest.raises(ModelError, match=r"model\.pt: a pickle file") as caught:
        find_source(str(saved(weights())))
    assert caught.value.hint.endswith("mule convert model.pt --out model-converted")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    Path("mine").mkdir()
    with pytest.raises(UserError, match="mine exists and is not a folder of Mule's"):
        run(saved(weights()), Path("mine"), shape=HEADS)
    with pytest.raises(UserError, match="already safetensors"):
        run(saved(weights(), "a.safetensors"), Path("out"), shape=HEADS)


# ---------------------------------------------------------------- files that mean harm


class Harm:
    """Pickled, it is a call of `function` for whoever unpickles it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def with_records(change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A file of torch.save with another pickle inside, or compressed records."""
    saved({"w": torch.ones(3, 4)}, "plain.pt")
    with zipfile.ZipFile("plain.pt") as old, zipfile.ZipFile("h.pt", "w", compression) as new:
        for entry in old.infolist():
            content = old.read(entry)
            is_pickle = entry.filename.endswith("data.pkl")
            new.writestr(entry.filename, change(content) if is_pickle else content)
    return Path("h.pt")


def legacy() -> Path:
    torch.save({"w": torch.ones(3, 4)}, "h.pt", _use_new_zipfile_serialization=False)
    return Path("h.pt")


def plain_pickle() -> Path:
    Path("h.pt").write_bytes(pickle.dumps(Harm(os.system, "touch ran")))
    return Path("h.pt")


def truncated() -> Path:
    Path("h.pt").write_bytes(saved(weights()).read_bytes()[:-100])
    return Path("h.pt")


def text() -> Path:
    Path("h.pt").write_text("version https://git-lfs.github.com/spec/v1")
    return Path("h.pt")


W = torch.ones(3, 4)
HARMFUL: dict[str, tuple[Callable[[], Path], str]] = {
    "a program": (lambda: saved([W, Harm(os.system, "touch ran")], "h.pt"), "`posix.system`"),
    "eval": (lambda: saved([W, Harm(eval, "open('ran', 'w')")], "h.pt"), "eval`"),
    "a plain object": (lambda: saved([W, argparse.Namespace()], "h.pt"), "`argparse.Namespace`"),
    "a module": (lambda: saved(torch.nn.Linear(3, 4), "h.pt"), "linear.Linear`"),
    "a plain pickle": (plain_pickle, "a plain pickle, or torch's form before 1.6"),
    "the old form": (legacy, "a plain pickle, or torch's form before 1.6"),
    "cut off": (truncated, "cut off or damaged"),
    "a pointer of git": (text, "not a file of torch.save"),
    "compressed": (lambda: with_records(bytes, zipfile.ZIP_DEFLATED), "records are compressed"),
    "a broken pickle": (lambda: with_records(lambda _: b"\x80\x02("), "h.pt: "),
    "values it has not": (
        lambda: saved({"w": torch.ones(1).expand(1 << 20, 1 << 20)}, "h.pt"),
        "w claims 4,398,046,511,104 bytes and holds 4",
    ),
    "a name with control codes": (lambda: saved({"\x1b[2Jw": W}, "h.pt"), "called ?[2Jw"),
    "no weights": (lambda: saved({"step": 3}, "h.pt"), "holds no state dict"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harm_is_refused_and_nothing_runs(name: str) -> None:
    make, says = HARMFUL[name]
    file = make()
    with pytest.raises(ModelError, match=r"^h\.pt: ") as caught:
        run(file, Path("out"))
    assert says in caught.value.message and caught.value.hint and caught.value.exit_code == 2
    assert caught.value.message.isprintable()
    assert not Path("ran").exists() and not Path("out").exists()
    assert not list(Path().glob(".partial-*"))


@pytest.mark.parametrize("event", ["os.system", "subprocess.Popen", "pickle.find_class", "os.fork"])
def test_the_hook_refuses_what_reading_never_needs(event: str) -> None:
    with pytest.raises(worker.Refused, match=event):
        worker._refuse_event(event, ())
    worker._refuse_event("open", ("file", "r", 0))


def test_the_child_refuses_a_program(
    monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., Any], mule_cli: Mule
) -> None:
    monkeypatch.setattr(pickled, "_run_child", in_process)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = saved({"w": W, "x": Harm(os.system, "touch ran")})
    code, _, err = mule_cli("convert", str(file), "--out", "out")
    assert code == 2 and "error: model.pt: asks to run `posix.system`" in err
    assert not Path("ran").exists()


@pytest.mark.slow
def test_the_child_is_stopped_at_its_limits(
    monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., Any]
) -> None:
    monkeypatch.setattr(pickled, "_run_child", in_process)
    if Path("/proc/self/statm").exists():  # macOS keeps no such limit
        bomb = saved({"w": W, "x": Harm(bytearray, 3 << 30)})  # a call that torch lets pass
        with pytest.raises(ModelError, match=r"needs more than 0\.2 GiB, more than such a file"):
            unpickle(bomb, Path("o"), None, Limits(1 << 28, 60))
    slow = with_records(lambda _: b"\x80\x02" + b")" * 20_000_000 + b".")
    with pytest.raises(ModelError, match="took more than 1 seconds of processor time"):
        unpickle(slow, Path("o"), None, Limits(1 << 30, 1))
    assert not Path("o").exists()


def test_the_child_converts(
    monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., Any], mule_cli: Mule
) -> None:
    monkeypatch.setattr(pickled, "_run_child", in_process)
    words = ["convert", str(saved(weights())), "--out", "out", *HEADS.settings, "--json"]
    code, out, err = mule_cli(*words)
    report = json.loads(out.splitlines()[-1])
    assert (code, report["bit_identical"], report["rounded"]) == (0, 30, 0), err
    assert "out has no tokenizer" in err and "model.rope_theta=10000.0" in err
    assert_equal(Path("out"), weights())
