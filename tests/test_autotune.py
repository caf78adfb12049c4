"""Plans: which variant each shape takes, chosen by rule, by measurement, or by a file."""

import json

import pytest
import torch

from core.linalg import autotune
from core.linalg.autotune import cache_file, plan_for
from core.linalg.coefficients import coefficients
from core.linalg.variants import Variant, variant_for, variants_for

CPU = torch.device("cpu")
COEFS = coefficients("quintic", 5)
CASE = {"dtype": torch.bfloat16, "precision": "medium", "device": CPU, "coefs": COEFS}
SHAPES = [(16, 24), (24, 16), (40, 40)]
SLOW = Variant("gram", torch.float16, (2,))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def measured(monkeypatch):
    """Shapes that were measured; SLOW is made out to be the fastest."""
    shapes = []

    def seconds(case, shape):
        shapes.append(shape)
        return {variant: 0.0 if variant == SLOW else 1.0 for variant in case.possible(shape)}

    monkeypatch.setattr(autotune, "_seconds", seconds)
    return shapes


def test_the_cache_is_where_the_system_wants_it(tmp_path, monkeypatch):
    assert cache_file() == tmp_path / "shardstep" / "newton_schulz.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_file() == tmp_path / "home" / ".cache" / "shardstep" / "newton_schulz.json"


def test_static_measures_reads_and_writes_nothing(measured):
    def never(make):
        raise AssertionError

    plan = plan_for("static", SHAPES, **CASE, agree=never)
    assert plan == {s: variant_for(s, torch.bfloat16, "medium", CPU, COEFS) for s in SHAPES}
    assert not measured
    assert not cache_file().exists()


def test_tuning_picks_one_that_is_exact_enough():
    plan = plan_for("tune", SHAPES, **CASE)
    assert list(plan) == SHAPES
    assert all(plan[s] in variants_for(s, torch.bfloat16, "medium", CPU, COEFS) for s in SHAPES)
    assert plan_for("tune", SHAPES, **CASE) == plan


def test_tuning_picks_the_fastest_and_remembers_it(measured):
    assert plan_for("tune", SHAPES[:2], **CASE) == dict.fromkeys(SHAPES[:2], SLOW)
    assert measured == SHAPES[:2]
    assert plan_for("tune", SHAPES, **CASE) == dict.fromkeys(SHAPES, SLOW)
    assert measured == SHAPES
    assert [path.name for path in cache_file().parent.iterdir()] == [cache_file().name]


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float32, "precision": "highest"},
        {"coefs": coefficients("simple", 5)},
        {"coefs": COEFS[:4]},
    ],
)
def test_what_else_is_asked_for_is_measured_apart(measured, other):
    plan_for("tune", SHAPES, **CASE)
    plan_for("tune", SHAPES, **{**CASE, **other})
    assert measured == SHAPES * 2
    plan_for("tune", SHAPES, **CASE)
    assert measured == SHAPES * 2


def test_a_variant_of_another_release_is_measured_anew(measured):
    plan_for("tune", SHAPES, **CASE)
    content = json.loads(cache_file().read_text())
    key = next(iter(content["variants"]))
    content["variants"][key]["restarts"] = [1]
    cache_file().write_text(json.dumps(content))
    assert plan_for("tune", SHAPES, **CASE) == dict.fromkeys(SHAPES, SLOW)
    assert len(measured) == len(SHAPES) + 1


def test_one_rank_decides_for_all(measured):
    """The others get its plan and measure nothing."""
    sent = []

    def first(make):
        sent.append(make())
        return sent[0]

    mine = plan_for("tune", SHAPES, **CASE, agree=first)
    theirs = plan_for("tune", SHAPES, **CASE, agree=lambda make: sent[0])
    assert mine == theirs == dict.fromkeys(SHAPES, SLOW)
    assert measured == SHAPES


def test_a_file_pins_the_plan(measured, tmp_path):
    plan = plan_for("tune", SHAPES, **CASE)
    pinned = tmp_path / "plan.json"
    cache_file().rename(pinned)
    assert plan_for(str(pinned), SHAPES, **CASE) == plan
    assert plan_for(str(pinned), SHAPES[1:], **CASE) == {s: plan[s] for s in SHAPES[1:]}
    assert measured == SHAPES
    with pytest.raises(ValueError, match=r"has no entry '.* 8x8 .*Run once with 'tune'"):
        plan_for(str(pinned), [*SHAPES, (8, 8)], **CASE)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"form": "gram", "dtype": "float16", "restarts": [1]}, "does not keep the accuracy of 'medium'"),
        ({"form": "cubic", "dtype": "float16", "restarts": []}, "possible: 'classic', 'gram'"),
        ({"form": "gram", "dtype": "int8", "restarts": []}, "is no variant"),
        ("classic", "is no variant"),
    ],
)
def test_an_unknown_variant_is_refused(measured, variant, message):
    plan_for("tune", SHAPES, **CASE)
    content = json.loads(cache_file().read_text())
    content["variants"] = dict.fromkeys(content["variants"], variant)
    cache_file().write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        plan_for(str(cache_file()), SHAPES, **CASE)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 0, "variants": {}}', '{"format": 1}'])
def test_another_file_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json"):
        plan_for(str(path), SHAPES, **CASE)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read as a plan .* 'static', 'tune'"):
        plan_for(str(tmp_path / "none.json"), SHAPES, **CASE)
