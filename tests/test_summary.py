"""`fr.summary`: what the penalty finds in the parameters, and the table it prints as."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from wings import JAX, TORCH, each_wing


def _params(wing, dtype="float32"):
    """A hidden layer with a dead unit, whose weights are rows here on both wings, and a head."""
    hidden = np.array([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 0.5], [0.0, 1.0, 0.0]])
    params = {"hidden": {"weight": hidden, "bias": np.zeros(4)}, "head": {"weight": np.array([[0.0, 0.5]])}}
    return wing.array(params, dtype)


def _penalty(fr):
    return fr.group_lasso(0.5, axis=-1, group_scale="one").on("hidden.weight") + fr.l1(2.0).on("*.weight")


@each_wing
def test_summary_says_value_zeros_and_dead_groups_of_every_leaf(wing):
    params = _params(wing)
    summary = wing.fr.summary(_penalty(wing.fr), params)
    rows = {row.name: row for row in summary.rows}
    assert len(rows) == len(summary.rows) == 3
    hidden, bias, head = rows["hidden.weight"], rows["hidden.bias"], rows["head.weight"]
    norms = 0.5 * (5**0.5 + 0 + 9.25**0.5 + 1)
    assert hidden.value == pytest.approx(norms + 2 * 7.5, rel=1e-6)
    assert hidden[:2] + hidden[3:] == ("hidden.weight", 12, 7, 4, 1, "group_lasso + l1")
    assert bias == ("hidden.bias", 4, 0.0, 4, None, None, "-")
    assert head == ("head.weight", 2, 1.0, 1, None, None, "l1")
    total = summary.total
    assert total.value == pytest.approx(float(_penalty(wing.fr).value(params)), rel=1e-6)
    assert total[:2] + total[3:] == ("total", 18, 12, 4, 1, "")


@each_wing
def test_summary_finds_a_row_by_name_and_shows_the_nearest_names(wing):
    summary = wing.fr.summary(_penalty(wing.fr), _params(wing))
    assert summary["head.weight"].zeros == 1
    with pytest.raises(KeyError, match="summary: no leaf 'hiden.weight'; nearest names: hidden.weight"):
        summary["hiden.weight"]


@each_wing
def test_summary_documents_every_field_of_a_row(wing):
    text = wing.fr.summary.__doc__
    assert all(f"`{field}`" in text for field in wing.fr.summary(wing.fr.l1(1.0), {}).total._fields)


@each_wing
def test_summary_prints_as_a_table(wing):
    wanted = {
        "hidden.weight": "hidden.weight    12  18.1387  7 (58.3%)       1 of 4  group_lasso + l1",
        "hidden.bias": "hidden.bias       4        0  4 (100.0%)           -  -",
        "head.weight": "head.weight       2        1  1 (50.0%)            -  l1",
    }
    summary = wing.fr.summary(_penalty(wing.fr), _params(wing))
    header, rule, *rows, second_rule, total = str(summary).split("\n")
    assert header.split() == ["leaf", "size", "value", "zeros", "dead", "groups", "penalty"]
    assert rule == second_rule == "-" * max(map(len, (header, *rows, total)))
    # JAX sorts the leaves
    names = list(wanted) if wing is TORCH else sorted(wanted)
    assert [" ".join(row.split()) for row in rows] == [" ".join(wanted[name].split()) for name in names]
    assert total.split() == ["total", "18", "19.1387", "12", "(66.7%)", "1", "of", "4"]
    ends = [line.index("4") for line in rows if line.startswith("hidden.bias")] + [total.index("18") + 1]
    assert len(set(ends)) == 1  # numbers are flush right
    assert repr(summary) == str(summary)
    assert all(line == line.rstrip() for line in str(summary).split("\n"))


@each_wing
def test_summary_without_groups_and_of_nothing(wing):
    params = {"w": wing.array([0.0, 1.0])}
    assert wing.fr.summary(wing.fr.l1(1.0), params).total[4:6] == (None, None)
    empty = wing.fr.summary(wing.fr.l1(1.0), {})
    assert empty.rows == () and empty.total == ("total", 0, 0, 0, None, None, "")
    assert str(empty).split("\n")[-1].split() == ["total", "0", "0", "0", "-"]
    no_entries = wing.fr.summary(wing.fr.group_lasso(1.0, axis=-1), {"e": wing.array(np.zeros((0, 3)))})
    assert no_entries.rows == (("e", 0, 0.0, 0, 0, 0, "group_lasso"),)


@each_wing
def test_summary_counts_the_groups_of_the_wings_own_layout(wing):
    weight = np.ones((3, 2))
    weight[1] = 0
    weight = weight if wing is TORCH else weight.T
    for per, groups, dead in (("output", 3, 1), ("input", 2, 0)):
        row = wing.fr.summary(wing.fr.group_lasso(1.0, per=per), {"w": wing.array(weight)}).rows[0]
        assert (row.groups, row.dead_groups) == (groups, dead)
    row = wing.fr.summary(wing.fr.group_lasso(1.0, per="output"), {"b": wing.array([0.0, 1.0, 0.0])}).rows[0]
    assert (row.groups, row.dead_groups) == (3, 2)


@each_wing
def test_summary_names_each_rule_once(wing):
    fr, params = wing.fr, {"w": wing.array([1.0])}
    penalty = fr.l1(0.1) + fr.elastic_net(0.1, 0.1) + fr.anchored(fr.l2(0.1), params) + fr.non_negative()
    (row,) = fr.summary(penalty, params).rows
    assert row.parts == "l1 + l2 + non_negative"
    assert row.value == pytest.approx(0.25)
    broken = fr.summary(fr.non_negative(), {"w": wing.array([-1.0])})
    assert broken.total.value == float("inf")
    assert "inf" in str(broken)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@each_wing
def test_summary_of_other_dtypes(wing, dtype):
    with wing.precision(dtype):
        total = wing.fr.summary(_penalty(wing.fr), _params(wing, dtype)).total
        assert total.value == pytest.approx(19.138725, rel=1e-6)
        assert (total.zeros, total.dead_groups) == (12, 1)
        assert type(total.zeros) is int and type(total.value) is float


def test_summary_of_parameters_that_train():
    net = torch.nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.zero_()
    summary = TORCH.fr.summary(TORCH.fr.l1(1.0), TORCH.fr.params(net))
    assert (summary.rows[0].name, summary.rows[0].zeros) == ("weight", 4)


def test_summary_of_an_nnx_module():
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    assert [(row.name, row.zeros) for row in JAX.fr.summary(JAX.fr.l1(1.0), model).rows] == [("bias", 2), ("scale", 0)]
    assert float(jnp.sum(model.var[...])) == 2


@pytest.mark.parametrize("wrong", [0.1, None, "l1", TORCH.fr.l1], ids=["number", "None", "string", "function"])
@each_wing
def test_summary_of_what_is_no_penalty_is_refused(wing, wrong):
    with pytest.raises(TypeError, match="^summary: penalty must be a penalty such as l1.*, got "):
        wing.fr.summary(wrong, {})


@each_wing
def test_summary_with_a_dead_glob_is_refused(wing):
    with pytest.raises(ValueError, match="'hiden' matches no leaf; nearest names: hidden"):
        wing.fr.summary(wing.fr.l1(0.1).on("hiden"), _params(wing))
