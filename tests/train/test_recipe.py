"""Recipes: what is read, what is refused and by which name, and that what is written is read again."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from puna.errors import TrainingError
from puna.train.objectives.distill import Distill
from puna.train.objectives.pairs import DPO
from puna.train.recipe import (
    DataSource,
    Method,
    Recipe,
    Saving,
    Training,
    read_recipe,
    recipe_from,
    recipe_to_toml,
)
from puna.train.tables import to_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GRPO = {"type": "grpo", "reward": "exact"}
PLAIN: dict[str, Any] = {"model": "smollm2", "output": "bot", "data": [{"path": "a.jsonl"}]}


def test_paths_of_objectives_begin_at_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text("{}")
    judged = recipe_from({**PLAIN, "objective": {"type": "grpo", "reward": "json", "schema": "schema.json"}}, tmp_path)
    assert judged.objective.schema == str(tmp_path / "schema.json")
    (tmp_path / "big.gguf").touch()
    knobs = {"type": "distill", "teacher": "big.gguf", "cache": "kept"}
    found = recipe_from({**PLAIN, "objective": knobs}, tmp_path).objective
    assert found == Distill(str(tmp_path / "big.gguf"), cache=str(tmp_path / "kept"))


def test_the_least_recipe() -> None:
    recipe = recipe_from(PLAIN)
    assert recipe == Recipe("smollm2", "bot", (DataSource("a.jsonl"),))
    assert (recipe.objective_name, recipe.rows, recipe.method.trained().rank) == ("sft", "documents", 16)


def test_paths_begin_at_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").touch()
    text = 'model = "base.gguf"\noutput = "bot"\n[[data]]\npath = "a.jsonl"\n[objective]\ntype = "dpo"\nbeta = 0.3\n'
    (tmp_path / "recipe.toml").write_text(text)
    recipe = read_recipe(tmp_path / "recipe.toml")
    assert recipe.model == str(tmp_path / "base.gguf")
    assert recipe.data[0].path == str(tmp_path / "a.jsonl")
    assert recipe.objective == DPO(beta=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, r"no field modle; did you mean model\?"),
        ({"learning_rate": 1}, r"no field learning_rate; did you mean training\.learning_rate\?"),
        ({"method": {"rnak": 3}}, r"no field method\.rnak; did you mean method\.rank\?"),
        ({"data": [{"path": "a", "colums": {}}]}, r"data\[0\]\.colums; did you mean data\[0\]\.columns"),
        ({"data": [{"weight": 1}]}, r"lacks data\[0\]\.path"),
        ({"data": []}, r"no \[\[data\]\]"),
        ({"data": {"path": "a"}}, "data must be a list"),
        ({"method": "lora"}, r"method must be a table, \[method\]"),
        ({"method": {"rank": "8"}}, r"method\.rank must be a whole number, found '8'"),
        ({"method": {"rank": True}}, r"method\.rank must be a whole number"),
        ({"method": {"rank": 0}}, "rank of LoRA must be at least 1"),
        ({"method": {"targets": ["q"]}}, "targets of LoRA"),
        ({"method": {"type": "lorra"}}, r"method\.type is 'lorra'; did you mean lora\?"),
        ({"method": {"type": "full", "rank": 8}}, r"method\.rank is LoRA's"),
        ({"method": {"frozen": "norm"}}, r"method\.frozen goes with type full"),
        ({"method": {"type": "full", "frozen": "("}}, r"method\.frozen is no regular expression"),
        ({"method": {"base_type": "Q8_0"}}, r"method\.base_type goes with type qlora"),
        ({"method": {"type": "qlora", "base_type": "Q8"}}, r"did you mean Q8_0\?"),
        ({"method": {"dora": True}}, r"set save\.merge"),
        ({"method": {"layers": [0, 2]}}, r"method\.layers makes a model of its own.* set save\.merge"),
        ({"method": {"type": "full", "layers": ["0"]}}, r"method\.layers\[0\] must be a whole number"),
        ({"objective": {"type": "distill"}}, r"lacks objective\.teacher"),
        ({"objective": {"type": "distill", "teacher": "a", "top_k": 0, "cache": "c"}}, "keeps nothing"),
        ({"training": {"epochs": 1, "steps": 3}}, r"training\.epochs and training\.steps"),
        ({"training": {"learning_rate": 0}}, r"training\.learning_rate must be above 0"),
        ({"training": {"learning_rate": float("nan")}}, r"training\.learning_rate must be a number"),
        ({"training": {"betas": [0.9]}}, r"training\.betas must be a list of 2"),
        ({"training": {"steps": 3, "warmup": 4}}, r"training\.warmup is 4, more than the 3 steps"),
        ({"training": {"optimizer": "adam"}}, r"training\.optimizer is 'adam'; did you mean adamw"),
        ({"training": {"answers": 2}}, r"training\.answers"),
        ({"save": {"format": "gguf"}}, r"set save\.merge"),
        ({"save": {"merge": True, "type": "Q4_9"}}, r"save\.type is 'Q4_9'; did you mean"),
        ({"save": {"merge": True, "format": "safetensors", "type": "Q4_0"}}, r"save\.type Q4_0 is GGUF's"),
        ({"objective": {"type": "dop"}}, r"objective\.type is 'dop'; did you mean dpo\?"),
        ({"objective": {"beta": 1}}, r"no field objective\.beta"),
        ({"objective": {"type": "dpo", "beta": -1.0}}, "beta of dpo"),
        ({"objective": "dpo"}, "objective must be a table"),
        ({"objective": {"type": "reward"}, "save": {"merge": True}}, r"\[save\] is not for a reward model"),
        (
            {"objective": {"type": "dpo"}, "data": [{"path": "a"}, {"path": "b", "variables": {"x": 1}}]},
            "variables differ",
        ),
        ({"objective": {"type": "dpo"}, "training": {"truncation": "split"}}, r"training\.truncation is split"),
        (
            {"objective": GRPO, "training": {"batch": 2}},
            r"training\.batch is not for grpo: objective\.prompts is how many",
        ),
        ({"objective": GRPO, "training": {"answers": 2}}, r"training\.answers is not for grpo: objective\.group"),
        ({"objective": GRPO, "training": {"truncation": "drop"}}, r"training\.truncation is not for grpo"),
        ({"objective": GRPO, "data": [{"path": "a", "train_on": "assistant"}]}, "train_on is assistant for a, but of"),
        ({"objective": {"type": "grpo"}}, r"lacks objective\.reward"),
        ({"objective": {"type": "grpo", "reward": "best"}}, "one of exact, number, regex, json; found 'best'"),
        ({"objective": {"type": "pretrain"}, "data": [{"path": "a", "train_on": "last"}]}, "pretraining learns"),
        ({"data": [{"path": "a", "weight": 1}, {"path": "b"}]}, "b has no weight"),
        ({"data": [{"path": "a", "validation": 1}]}, "everything is held out"),
        ({"data": [{"path": "a", "validation": 2}]}, "validation, of a, is a share"),
        ({"output": "smollm2"}, "output is the model itself"),
        ({"output": "no name!"}, "is not a model name"),
        ({"seed": 1.0}, "seed must be a whole number"),
        ({"dtype": "float16"}, r"dtype is 'float16'; did you mean bfloat16\?"),
    ],
)
def test_bad_recipes_are_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        recipe_from({**PLAIN, **changes})


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("model =")
    with pytest.raises(TrainingError, match=r"bad\.toml is not TOML"):
        read_recipe(tmp_path / "bad.toml")


texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    texts | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(texts, values, max_size=4))
def test_any_table_is_written_as_it_is(table: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(table)) == table


@given(
    sources=st.lists(
        st.builds(
            DataSource,
            path=texts,
            format=st.none() | texts,
            columns=st.dictionaries(texts, texts, max_size=2),
            weight=st.floats(0.1, 10),
            validation=st.none() | st.floats(0, 0.9),
            train_on=st.sampled_from([None, "last", "everything"]),
            skip_bad=st.integers(0, 9),
            variables=st.dictionaries(texts, values, max_size=2),
        ),
        min_size=1,
        max_size=3,
    ),
    method=st.sampled_from([Method(), Method("qlora", rank=3, alpha=1.5), Method("lora", targets=("q_proj",))]),
    training=st.builds(Training, epochs=st.none() | st.floats(0.1, 9), betas=st.just((0.8, 0.9)), length=st.just(64)),
    seed=st.integers(-5, 5),
)
def test_what_is_written_is_read_again(sources: Any, method: Method, training: Training, seed: int) -> None:
    one_template = all(source.variables == sources[0].variables for source in sources)
    objective = DPO(beta=0.25) if seed > 0 and one_template else recipe_from(PLAIN).objective
    saving = Saving(merge=seed > 2)
    recipe = Recipe("smollm2", "bot", tuple(sources), objective, method, training, saving, seed=seed)
    assert recipe_from(tomllib.loads(recipe_to_toml(recipe))) == recipe
