"""Of real configurations with one planted mistake each, how many are named, and named first."""

from __future__ import annotations

from pathlib import Path

import pytest

from mule.compare.import_recipe import Imported, Overrides, import_file
from tests.dialects.planted import (
    KINDS,
    ORIGINALS,
    PLANTED,
    WRONG_AS_PUBLISHED,
    Planted,
    spoilt,
)

NAMES = sorted(file.name for file in ORIGINALS.iterdir())
FOREIGN = Path("config.yml")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "import.md"


@pytest.fixture(scope="module")
def originals() -> dict[str, Imported]:
    """Each original as it was published, imported once."""
    return {name: import_file(ORIGINALS / name) for name in NAMES}


@pytest.fixture(scope="module")
def spoilt_ones(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Planted, Imported]]:
    """Each configuration with its planted mistake, imported once."""
    folder, found = tmp_path_factory.mktemp("planted"), []
    for planted in PLANTED:
        (folder / planted.file).write_text(planted.text(), encoding="utf-8")
        found.append((planted, import_file(folder / planted.file)))
    return found


def test_planted_mistakes_are_named_first(spoilt_ones: list[tuple[Planted, Imported]]) -> None:
    first, named = [], []
    for planted, imported in spoilt_ones:
        found = imported.mistakes
        said = [(one.code, one.key) for one in found]
        named += [planted.file] if (planted.code, planted.key) in said else []
        first += [planted.file] if said[:1] == [(planted.code, planted.key)] else []
        print(f"{planted.file:<40} {planted.code:<28} {said}")
    print(f"{len(first)} of {len(PLANTED)} named first, {len(named)} named")
    assert f"**{len(first)} of {len(PLANTED)} named first**" in PAGE.read_text(encoding="utf-8")
    assert len(PLANTED) >= 20
    assert len({planted.file for planted in PLANTED}) == len(PLANTED)
    assert len(first) == len(PLANTED)


def test_the_originals_raise_no_false_suspicion(originals: dict[str, Imported]) -> None:
    suspected = {name: [one.code for one in found.mistakes] for name, found in originals.items()}
    false = {
        name: codes
        for name, codes in suspected.items()
        if codes and codes != [WRONG_AS_PUBLISHED.get(name)]
    }
    print(f"{len(false)} of {len(NAMES)} originals with a false suspicion: {false}")
    said = f"**{len(false)} of {len(NAMES)} with a false suspicion**"
    assert said in PAGE.read_text(encoding="utf-8")
    assert false == {}
    assert {name for name, codes in suspected.items() if codes} == set(WRONG_AS_PUBLISHED)


def test_a_mistake_says_what_why_and_what_instead(
    spoilt_ones: list[tuple[Planted, Imported]],
) -> None:
    for planted, imported in spoilt_ones:
        (one, *_) = imported.mistakes
        assert one.found and one.why and one.do
        assert one.line or planted.file.endswith(".sh"), planted.file


@pytest.mark.parametrize(
    ("tool", "text", "code"),
    [
        ("axolotl", "adapter: lora\nlora_r: 8\nlora_alpha: 1024", "scale-too-large"),
        ("axolotl", "adapter: lora\nlora_r: 512\nlora_alpha: 1", "scale-too-small"),
        ("axolotl", "adapter: lora\nlora_r: 8\nlora_dropout: 5", "dropout-too-large"),
        ("axolotl", "adapter: lora\nlora_r: 4000\nlora_alpha: 4000", "rank-too-large"),
        ("axolotl", "adapter: qlora\nload_in_4bit: false", "qlora-without-bits"),
        ("axolotl", "load_in_4bit: true", "quantised-full"),
        ("axolotl", "lora_r: 8", "adapter-off"),
        ("axolotl", "val_set_size: 0.95", "too-much-held-out"),
        ("axolotl", "num_epochs: 300", "too-many-epochs"),
        ("axolotl", "warmup_ratio: 0.9", "warm-up-too-long"),
        ("axolotl", "max_steps: 100\nwarmup_steps: 500", "warm-up-too-long"),
        ("axolotl", "micro_batch_size: 0", "batch-zero"),
        ("axolotl", "gradient_accumulation_steps: 5000", "update-too-large"),
        ("axolotl", "adam_epsilon: 0.01", "eps-odd"),
        ("axolotl", "max_grad_norm: 1e-9", "clip-too-small"),
        ("axolotl", "lr_scheduler_kwargs:\n  min_lr: 0.1", "lowest-above-highest"),
        ("trl", "learning_rate: 0", "rate-zero"),
        ("trl", "learning_rate: 1e-12", "rate-too-low"),
        ("llama-factory", "dataset: dpo_en_demo", "data-of-another-kind"),
        ("llama-factory", "dataset: c4_demo\nstage: sft", "data-of-another-kind"),
        ("llama-factory", "dataset: identity\nstage: pt", "data-of-another-kind"),
        ("mlx-lm", "lora_parameters: {rank: 8, scale: 0}", "alpha-zero"),
        (
            "mlx-lm",
            "iters: 1000\nlr_schedule: {name: cosine_decay, arguments: [1e-5, 100]}",
            "schedule-of-another-length",
        ),
    ],
)
def test_each_check_names_its_mistake(tmp_path: Path, tool: str, text: str, code: str) -> None:
    rate = "" if "learning_rate" in text else "learning_rate: 2e-5\n"
    file = tmp_path / FOREIGN
    file.write_text(f"{rate}{text}\n", encoding="utf-8")
    data = [] if "dataset" in text else ["d"]
    found = import_file(file, tool, Overrides(model="org/model-7b", data=data))
    assert code in [one.code for one in found.mistakes]


@pytest.mark.slow
def test_every_kind_of_mistake_on_every_original(
    originals: dict[str, Imported], tmp_path: Path
) -> None:
    """A wider count than the chosen ones: what is missed is printed, and stays rare."""
    total, first, named, missed = 0, 0, 0, []
    for code, keys, how in KINDS:
        for name in NAMES:
            own = [one.code for one in originals[name].mistakes]
            text = spoilt((ORIGINALS / name).read_text(encoding="utf-8"), keys, how)
            if text is None or code in own:
                continue
            (tmp_path / name).write_text(text, encoding="utf-8")
            said = [one.code for one in import_file(tmp_path / name).mistakes]
            new = [one for one in said if one not in own]
            total, named, first = total + 1, named + (code in said), first + (new[:1] == [code])
            missed += [] if new[:1] == [code] else [(code, name, said)]
    print(f"{first} of {total} named first, {named} named; others: {missed}")
    said = f"**{first} of {total} named first**, {named} named"
    assert said in PAGE.read_text(encoding="utf-8")
    assert total > 200 and first >= 0.9 * total
