"""The front door and the tree of errors."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re

import pytest

import mlx_engine
from mlx_engine import EngineState, errors
from tests.conftest import ROOT
from tests.mutations import MUTATIONS, Mutation


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert mlx_engine.__all__ == sorted(mlx_engine.__all__, key=lambda n: (not n.isupper(), n))
    for name in mlx_engine.__all__:
        assert getattr(mlx_engine, name) is not None
    assert dir(mlx_engine) == sorted(mlx_engine.__all__), "that is what completion shows"
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = mlx_engine.Nonsense  # type: ignore[attr-defined]


def test_help_begins_with_every_public_name_and_no_other() -> None:
    docstring = mlx_engine.__doc__ or ""
    told = docstring.split("Its names, ")[1].split("``mlx_engine.testing``")[0]
    there = {*re.findall(r"\b(?:[A-Z]\w*[a-z]\w*|MTP|[a-z]+_\w+)", told)}
    assert there == {*mlx_engine.__all__}


@pytest.mark.parametrize(
    "name", ["SimpleEngine", "BatchedEngine", "ProcessEngine", "EngineManager"]
)
def test_a_call_without_a_model_names_what_was_called(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}.__init__"):
        getattr(mlx_engine, name)()


def test_every_public_thing_has_a_docstring() -> None:
    for name in mlx_engine.__all__:
        thing = getattr(mlx_engine, name)
        if not inspect.isclass(thing):
            continue  # the name of a type
        assert inspect.getdoc(thing), name
        for method, value in vars(thing).items():
            if not method.startswith("_") and (inspect.isfunction(value)):
                assert inspect.getdoc(value), f"{name}.{method}"


def test_the_tree_of_errors_is_the_one_in_the_docstring() -> None:
    assert errors.__doc__ is not None
    drawn = errors.__doc__
    for name, error in vars(errors).items():
        if not (inspect.isclass(error) and issubclass(error, Exception)):
            continue
        assert name in drawn
        assert name in mlx_engine.__all__
        assert issubclass(error, errors.MLXEngineError)
    assert issubclass(errors.InvalidRequest, ValueError)
    assert issubclass(errors.ContextLengthExceeded, errors.InvalidRequest)
    assert issubclass(errors.EngineDead, errors.EngineNotRunning)


@pytest.mark.parametrize(
    "error",
    [
        errors.ModelLoadError("x"),
        errors.InvalidRequest("stop", "must not be empty"),
        errors.ContextLengthExceeded("p", prompt_tokens=5, max_tokens=None, context_length=4),
        errors.EngineBusy("b", retry_after=2.5),
        errors.EngineDead("r", exit_code=-9),
    ],
)
def test_errors_travel_between_processes(error: errors.MLXEngineError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_what_is_broken_to_try_the_tests_is_still_there(mutation: Mutation) -> None:
    source = (ROOT / "mlx_engine" / mutation.file).read_text("utf-8")
    assert source.count(mutation.old) == 1


def test_a_state_is_its_string_and_statistics_have_the_state() -> None:
    assert [state == state.value == str(state) for state in EngineState] == [True] * 6
    engine = mlx_engine.SimpleEngine("demo")
    assert engine.stats().state is engine.state is EngineState.CREATED
    assert json.dumps({"state": engine.state}) == '{"state": "created"}'
