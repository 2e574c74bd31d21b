"""Several models are one module to the engine, with paths that say which model is meant."""

from __future__ import annotations

import copy
from collections import OrderedDict

from torch import nn

from tightfit.step.exclude import excluded_paths
from tightfit.step.model import give_gradients
from tightfit.step.models import as_model, first_of, given_as, is_training, name_of, paths_of_models
from tightfit.step.resident import Gradients


def test_a_single_model_stays_what_it_is() -> None:
    model = nn.ModuleList([nn.Linear(2, 2)])
    assert as_model(model) is given_as(model) is first_of(model) is model
    assert paths_of_models(model) == ()
    assert name_of(model) == "ModuleList"


def test_any_key_becomes_a_path_that_leads_to_the_model() -> None:
    keys = ["type", "a.b", "a_b", 1, "1", "", ("x", 2), "forward", "given"]
    models = OrderedDict((key, nn.Linear(2, 2)) for key in keys)
    held = as_model(models)
    paths = paths_of_models(held)
    assert len(set(paths)) == len(keys)
    assert [held.get_submodule(path) for path in paths] == list(models.values())
    assert "a_b" in paths
    assert given_as(held) is models
    assert excluded_paths(held, [models["type"]]) == ("type_",)


def test_a_copy_holds_its_copies_in_a_container_of_the_same_kind() -> None:
    models = (nn.Linear(2, 2), nn.Linear(2, 3))
    held = as_model(models)
    other = copy.deepcopy(held)
    assert type(given_as(other)) is tuple
    assert list(given_as(other)) == list(other.children())
    assert all(one is not copied for one, copied in zip(models, given_as(other), strict=True))
    assert is_training(held)
    for model in models:
        model.eval()
    assert not is_training(held)


def test_gradients_are_given_where_a_backward_was_seen_to_give_one() -> None:
    trained, average, judge = (nn.Linear(2, 2) for _ in range(3))
    held = as_model({"trained": trained, "average": average})
    gradients = Gradients(["average.weight", "average.bias"])
    assert set(map(id, gradients.give(held, [judge]))) == {id(p) for p in trained.parameters()}
    give_gradients(judge)
    average.bias.grad = average.bias.detach().clone()
    before = gradients.count
    assert gradients.learn(held, [judge])
    assert gradients.count == before + 3
    assert not gradients.learn(held, [judge])
    judge.weight.grad = average.bias.grad = None
    assert gradients.lacking([judge]) == [judge.weight]
    assert {id(p) for p in gradients.give(held, [judge])} == {id(judge.weight), id(average.bias)}
    assert average.weight.grad is None
