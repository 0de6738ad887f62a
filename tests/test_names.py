"""Leaf names: one rule for every kind of tree, equal at `init` and `update`; what is passed over; what is refused."""

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import flax
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax.training.train_state import TrainState

from wings import JAX, TORCH, dtype_name, each_wing


def _names(wing, tree, sort=True):
    """The names that a selector sees."""
    seen = []

    def note(name, leaf):
        del leaf
        seen.append(name)
        return False

    wing.fr.l1(1.0).on(note).value(tree)
    return sorted(seen) if sort else seen


# --- one rule ---


class Pair(NamedTuple):
    weight: Any
    bias: Any


@dataclasses.dataclass
class TorchLayer:
    weight: Any
    bias: Any
    act: str = "relu"


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class JaxLayer:
    """As an equinox module is: a pytree with static fields that can be called."""

    weight: Any
    bias: Any
    act: str = dataclasses.field(default="relu", metadata={"static": True})

    def __call__(self, x):
        return x @ self.weight + self.bias


torch.utils._pytree.register_dataclass(TorchLayer, field_names=["weight", "bias"], drop_field_names=["act"])
LAYER = {"torch": TorchLayer, "jax": JaxLayer}

TREES = {
    "dict": (lambda wing, a, b: {"weight": a, "bias": b}, ["bias", "weight"]),
    "nested": (lambda wing, a, b: {"net": {"out": {"weight": a}, "bias": b}}, ["net.bias", "net.out.weight"]),
    "list": (lambda wing, a, b: {"layers": [{"weight": a}, {"weight": b}]}, ["layers.0.weight", "layers.1.weight"]),
    "tuple": (lambda wing, a, b: (a, (b,)), ["0", "1.0"]),
    "namedtuple": (lambda wing, a, b: [Pair(a, b)], ["0.bias", "0.weight"]),
    "dataclass": (lambda wing, a, b: {"out": LAYER[wing.name](a, b)}, ["out.bias", "out.weight"]),
    "OrderedDict": (lambda wing, a, b: collections.OrderedDict(weight=a, bias=b), ["bias", "weight"]),
    "defaultdict": (lambda wing, a, b: collections.defaultdict(dict, {"out": {"w": a, "b": b}}), ["out.b", "out.w"]),
    "int keys": (lambda wing, a, b: {"layers": {0: a, 1: b}}, ["layers.0", "layers.1"]),
    "dotted keys": (lambda wing, a, b: {"out.weight": a, "out.bias": b}, ["out.bias", "out.weight"]),
    "key value": (lambda wing, a, b: {"value": a, "head": {"raw_value": b}}, ["head.raw_value", "value"]),
    "leading params": (lambda wing, a, b: {"params": {"out": {"weight": a, "bias": b}}}, ["out.bias", "out.weight"]),
    "params inside": (lambda wing, a, b: {"net": {"params": {"w": a}}, "b": b}, ["b", "net.params.w"]),
    "params twice": (lambda wing, a, b: {"params": {"params": {"w": a}, "b": b}}, ["b", "params.w"]),
    "params a leaf": (lambda wing, a, b: {"params": a, "other": b}, ["other", "params"]),
    "siblings": (lambda wing, a, b: {"params": {"w": a}, "batch_stats": {"w": b, "mean": b}}, ["w"]),
}


@pytest.mark.parametrize("tree", TREES)
@each_wing
def test_names_are_path_components_joined_by_dots(wing, tree):
    make, expected = TREES[tree]
    assert _names(wing, make(wing, wing.array([1.0]), wing.array([2.0]))) == expected


@pytest.mark.parametrize("tree", TREES)
@each_wing
def test_trees_come_back_in_their_own_structure(wing, tree):
    make, names = TREES[tree]
    params = make(wing, wing.array([3.0]), wing.array([-4.0]))
    gradient, new = wing.fr.l1(1.0).grad(params), wing.fr.l1(1.0).prox(params, 0.5)
    expected = make(wing, wing.array([2.5]), wing.array([-3.5]))
    signs = make(wing, wing.array([1.0]), wing.array([-1.0]))
    if tree == "siblings":
        expected["batch_stats"], signs["batch_stats"] = (
            params["batch_stats"],
            {k: wing.array([0.0]) for k in ("w", "mean")},
        )
    for ours, theirs in ((new, expected), (gradient, signs)):
        assert type(ours) is type(theirs)
        leaves = torch.utils._pytree.tree_leaves if wing is TORCH else jax.tree.leaves
        structure = torch.utils._pytree.tree_structure if wing is TORCH else jax.tree.structure
        assert structure(ours) == structure(theirs)
        for x, y in zip(leaves(ours), leaves(theirs), strict=True):
            np.testing.assert_array_equal(wing.numpy(x), wing.numpy(y))


@each_wing
def test_a_bare_leaf_has_the_empty_name(wing):
    assert _names(wing, wing.array([1.0])) == [""]


@each_wing
def test_two_leaves_of_one_name_are_refused_by_name(wing):
    x = wing.array([1.0])
    params = {"layers.0.weight": x, "layers": [{"weight": x}], "other": x}
    penalty = wing.fr.l1(1.0)
    calls = [
        lambda: penalty.value(params),
        lambda: penalty.grad(params),
        lambda: penalty.prox(params, 0.1),
        lambda: wing.fr.summary(penalty, params),
        lambda: wing.fr.prox_sgd(0.1, penalty).init(params),
        lambda: wing.fr.to_flat(params),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="two leaves have the name 'layers.0.weight'"):
            call()


@each_wing
def test_two_leaves_of_one_name_are_refused_in_trees_beside_the_parameters(wing):
    x = wing.array([1.0])
    params, twice = {"a": {"b": x}}, {"a": {"b": x}, "a.b": 2 * x}
    penalty = wing.fr.l1(1.0)
    calls = [
        lambda: penalty.prox(params, twice),
        lambda: wing.fr.anchored(penalty, twice).value(params),
        lambda: wing.fr.anchored(penalty, params, twice).value(params),
        lambda: penalty.on({"a": {"b": True}, "a.b": False}).value(params),
        lambda: wing.fr.add_penalty_gradient(penalty).update(
            twice, wing.fr.add_penalty_gradient(penalty).init(params), params
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="two leaves have the name 'a.b'"):
            call()


@each_wing
def test_params_beside_siblings_of_one_name_are_no_duplicates(wing):
    params = {"params": {"w": wing.array([1.0])}, "stats": {"w": wing.array([5.0])}, "w": wing.array([7.0])}
    assert float(wing.fr.l1(1.0).value(params)) == 1


@each_wing
def test_an_empty_params_collection_still_passes_its_siblings_over(wing):
    assert float(wing.fr.l1(1.0).value({"params": {}, "batch_stats": {"mean": wing.array([5.0])}})) == 0


# --- order ---


@each_wing
def test_the_order_of_a_dict_never_matters(wing):
    """torch keeps the order of insertion, JAX sorts: leaves are matched by name, never by place."""
    fr = wing.fr

    def tree(b, a, c, order):
        leaves = {"b": b, "a": a, "c": c}
        return wing.array({key: leaves[key] for key in order})

    params = tree([3.0], [-5.0], [7.0], "bac")
    for order in ("abc", "cba", "cab"):
        steps, anchor, importance = (
            tree([1.0], [2.0], [0.0], order),
            tree([1.0], [2.0], [3.0], order),
            tree([1.0], [10.0], [100.0], order),
        )
        new = wing.numpy(fr.l1(1.0).prox(params, steps))
        assert {key: value.tolist() for key, value in new.items()} == {"a": [-3], "b": [2], "c": [7]}
        assert float(fr.anchored(fr.l2(2.0), anchor, importance).value(params)) == 4 + 490 + 1600
        for transformation in (
            fr.prox_sgd(0.5, fr.l1(0.0), momentum=0.5),
            fr.prox_adam(0.5, fr.l1(0.0)),
            fr.add_penalty_gradient(fr.l2(0.0)),
        ):
            gradients = tree([1.0], [0.0], [2.0], order)
            state = transformation.init(tree([0.0], [0.0], [0.0], order))
            updates, _ = transformation.update(gradients, state, params)
            assert list(updates) == list(params) if wing is TORCH else True
            assert float(updates["a"][0]) == 0
            assert float(updates["b"][0]) != 0
        total = fr.penalize(lambda p: p["a"].sum() * 0, fr.layerwise({"a": fr.l1(1.0), "[bc]": None}))
        assert float(total(params)) == 5


# --- passed over ---


def _plain(x):
    return x


PASSED_OVER = {
    "torch": {
        "int array": (lambda: torch.tensor([1, 2]), [0, 0]),
        "bool array": (lambda: torch.tensor([True]), [False]),
        "None": (lambda: None, None),
        "int": (lambda: 3, 0),
        "bool": (lambda: True, False),
        "float": (lambda: 2.5, 0.0),
        "numpy scalar": (lambda: np.float32(2.5), np.float32(0)),
        "string": (lambda: "relu", "relu"),
        "bytes": (lambda: b"relu", b"relu"),
        "function": (lambda: _plain, _plain),
        "dtype": (lambda: torch.float32, torch.float32),
    },
    "jax": {
        "int array": (lambda: jnp.array([1, 2], np.int32), [0, 0]),
        "numpy int array": (lambda: np.array([1, 2], np.int32), [0, 0]),
        "bool array": (lambda: jnp.array([True]), [False]),
        "raw key": (lambda: jax.random.PRNGKey(3), [0, 0]),
        "None": (lambda: None, None),
        "int": (lambda: 3, 0),
        "bool": (lambda: True, False),
        "float": (lambda: 2.5, 0.0),
        "numpy scalar": (lambda: np.float32(2.5), np.float32(0)),
        "string": (lambda: "relu", "relu"),
        "bytes": (lambda: b"relu", b"relu"),
        "function": (lambda: _plain, _plain),
        "dtype": (lambda: np.dtype("float32"), np.dtype("float32")),
    },
}


@pytest.mark.parametrize(("wing", "kind"), [(w, kind) for w in (TORCH, JAX) for kind in PASSED_OVER[w.name]], ids=str)
def test_what_is_no_array_of_floats_is_passed_over(wing, kind):
    make, zero = PASSED_OVER[wing.name][kind]
    other = make()
    params = {"w": wing.array([2.0]), "other": other}
    penalty = wing.fr.l1(1.0) + wing.fr.l2(1.0)
    assert _names(wing, params) == ["w"]
    assert float(penalty.value(params)) == 4
    gradient, new = penalty.grad(params), penalty.prox(params, 1.0)
    assert new["other"] is other
    assert float(new["w"][0]) == 0.5 and float(gradient["w"][0]) == 3
    if isinstance(zero, list):
        assert dtype_name(gradient["other"]) == dtype_name(other) and gradient["other"].tolist() == zero
    else:
        assert gradient["other"] == zero and type(gradient["other"]) is type(zero)


def test_typed_prng_keys_are_passed_over():
    params = {"w": jnp.array([2.0]), "key": jax.random.key(0)}
    assert _names(JAX, params) == ["w"]
    assert JAX.fr.l1(1.0).prox(params, 1.0)["key"] is params["key"]
    gradient = JAX.fr.l1(1.0).grad(params)
    assert gradient["key"].dtype == jax.dtypes.float0  # as jax.grad(allow_int=True) gives for a key
    assert float(gradient["w"][0]) == 1


@each_wing
def test_transformations_pass_over_what_penalties_pass_over(wing):
    params = {"w": wing.array([2.0]), "steps": 3 if wing is TORCH else jnp.array(3)}
    gradients = {"w": wing.array([1.0]), "steps": 0 if wing is TORCH else jnp.array(0)}
    for transformation in (
        wing.fr.prox_sgd(0.5, wing.fr.l1(1.0), momentum=0.5),
        wing.fr.prox_adam(0.5, wing.fr.l1(1.0)),
    ):
        state = transformation.init(params)
        updates, _ = transformation.update(gradients, state, params)
        assert int(updates["steps"]) == 0
        assert float(updates["w"][0]) < 0


# --- refused ---


class _Bag:
    """A container that no framework knows."""

    def __init__(self, leaf):
        self.leaf = leaf

    def __iter__(self):
        return iter([self.leaf])


@dataclasses.dataclass
class Unregistered:
    leaf: Any


OPAQUE = {
    "torch": {
        "FrozenDict": (lambda: flax.core.freeze({"w": torch.ones(1)}), "FrozenDict"),
        "nnx.State": (lambda: nnx.State({"w": nnx.Param(jnp.ones(1))}), "State"),
        "nnx.Module": (lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "Linear"),
        "nn.Module": (lambda: torch.nn.Linear(1, 1), "Linear"),
        "ParameterDict": (lambda: torch.nn.ParameterDict({"w": torch.ones(1)}), "ParameterDict"),
        "numpy array": (lambda: np.ones(2), "numpy.ndarray"),
        "numpy 0-d": (lambda: np.array(1.0), "numpy.ndarray"),
        "jax array": (lambda: jnp.ones(2), "Array"),
        "set": (lambda: {1.0}, "builtins.set"),
        "generator": (lambda: (x for x in [torch.ones(1)]), "generator"),
        "dataclass": (lambda: Unregistered(torch.ones(1)), "test_names.Unregistered"),
        "iterable": (lambda: _Bag(torch.ones(1)), "test_names._Bag"),
    },
    "jax": {
        "torch tensor": (lambda: torch.ones(2), "torch.Tensor"),
        "torch Parameter": (lambda: torch.nn.Parameter(torch.ones(2)), "Parameter"),
        "torch.nn.Module": (lambda: torch.nn.Linear(1, 1), "Linear"),
        "linen.Module": (lambda: linen.Dense(1), "Dense"),
        "deque": (lambda: collections.deque([jnp.ones(1)]), "collections.deque"),
        "set": (lambda: {1.0}, "builtins.set"),
        "dataclass": (lambda: Unregistered(jnp.ones(1)), "test_names.Unregistered"),
        "iterable": (lambda: _Bag(jnp.ones(1)), "test_names._Bag"),
    },
}


@pytest.mark.parametrize(("wing", "kind"), [(w, kind) for w in (TORCH, JAX) for kind in OPAQUE[w.name]], ids=str)
def test_opaque_containers_are_refused_by_name(wing, kind):
    make, says = OPAQUE[wing.name][kind]
    penalty = wing.fr.l1(1.0)
    calls = [
        lambda tree: penalty.value(tree),
        lambda tree: penalty.grad(tree),
        lambda tree: penalty.prox(tree, 0.1),
        lambda tree: wing.fr.prox_sgd(0.1, penalty).init(tree),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="'net.inner'") as error:
            call({"w": wing.array([1.0]), "net": {"inner": make()}})
        assert says in str(error.value)
        with pytest.raises(TypeError):
            call(make())


def test_a_deque_is_a_tree_in_torch():
    assert _names(TORCH, collections.deque([torch.ones(1), torch.ones(1)])) == ["0", "1"]


@pytest.mark.parametrize("generator", ["parameters", "named_parameters"])
def test_a_generator_of_parameters_is_refused_with_the_remedy(generator):
    net, penalty = torch.nn.Linear(1, 1), TORCH.fr.l1(1.0)
    for call in (penalty.value, TORCH.fr.prox_adam(0.1, penalty).init):
        with pytest.raises(TypeError, match=r"^params: got a generator, .*; pass fr.params\(net\), the dict"):
            call(getattr(net, generator)())


def test_a_linen_module_as_parameters_is_refused_with_the_remedy():
    penalty = JAX.fr.l1(1.0)
    for call in (penalty.value, JAX.fr.prox_adam(0.1, penalty).init, JAX.fr.params):
        with pytest.raises(TypeError, match=r"^params: got the linen module Dense, .*; pass its variables"):
            call(linen.Dense(1))


def test_an_array_of_another_library_is_no_strength():
    jax_says = (
        "l1: lam must be a number or an array, got an array of torch; funcreg.jax takes those of jax and of NumPy"
    )
    torch_says = "got an array of jaxlib; funcreg.torch takes those of torch and of NumPy"
    for wing, strength, says in ((JAX, torch.tensor(0.1), jax_says), (TORCH, jnp.array(0.1), torch_says)):
        with pytest.raises(TypeError, match=says):
            wing.fr.l1(strength)
    with pytest.raises(TypeError, match="got Array\\(True, dtype=bool"):
        JAX.fr.l1(jnp.array(True))


def test_a_module_as_parameters_of_the_torch_wing_is_refused_with_the_remedy():
    with pytest.raises(TypeError, match=r"pass fr.params\(model\)"):
        TORCH.fr.l1(1.0).value(torch.nn.Linear(1, 1))


# --- torch models ---


class _Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(3, 2)
        self.decoder = torch.nn.Linear(2, 3)
        self.decoder.weight = self.embedding.weight
        self.norm = torch.nn.BatchNorm1d(2)  # with buffers


def test_torch_names_are_those_of_named_parameters():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    names = [name for name, _ in net.named_parameters()]
    params = TORCH.fr.params(net)
    assert _names(TORCH, params, sort=False) == list(params) == names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert _names(TORCH, net.state_dict(), sort=False) == names
    assert params["0.weight"] is net[0].weight
    torch.func.functional_call(net, TORCH.fr.l1(1.0).prox(params, 0.1), torch.ones(1, 2))


def test_params_contain_a_tied_tensor_once_and_a_tree_counts_what_it_contains():
    net = _Tied()
    params = TORCH.fr.params(net)
    assert list(params) == ["embedding.weight", "decoder.bias", "norm.weight", "norm.bias"]
    table = net.embedding.weight.detach().abs().sum()
    once = TORCH.fr.l1(1.0).on(["embedding", "decoder.bias"]).value(params).detach()
    torch.testing.assert_close(once, table + net.decoder.bias.detach().abs().sum())
    torch.testing.assert_close(TORCH.fr.l1(1.0).on(["embedding", "decoder.weight"]).value(net.state_dict()), 2 * table)


@pytest.mark.parametrize("wrong", [{"w": torch.ones(1)}, None, torch.nn.Linear, [torch.nn.Linear(1, 1)]], ids=str)
def test_params_of_what_is_no_torch_module_is_refused(wrong):
    with pytest.raises(TypeError, match="params: model must be an nn.Module, got"):
        TORCH.fr.params(wrong)


# --- flax models ---


class _Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(2, name="hidden")(x)
        x = linen.BatchNorm(use_running_average=True)(x)
        return linen.Dense(1)(x)


LINEN_NAMES = [
    "BatchNorm_0.bias",
    "BatchNorm_0.scale",
    "Dense_0.bias",
    "Dense_0.kernel",
    "hidden.bias",
    "hidden.kernel",
]


@functools.cache
def _linen_variables():
    return _Linen().init(jax.random.key(0), jnp.ones((1, 2)))


class Count(nnx.Variable):
    pass


class _Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(2, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)  # with BatchStat
        self.dropout = nnx.Dropout(0.5, rngs=rngs)  # with a key and a count
        self.layers = nnx.List([nnx.Linear(2, 1, rngs=rngs)])
        self.calls = Count(jnp.zeros(()))  # a float that is no parameter
        self.low_rank = nnx.LoRAParam(jnp.ones((2, 1)))  # a subclass of Param

    def __call__(self, x):
        return self.layers[0](self.norm(self.hidden(x) + (x @ self.low_rank) * self.dropout(x)))


NNX_NAMES = ["hidden.bias", "hidden.kernel", "layers.0.bias", "layers.0.kernel", "low_rank", "norm.bias", "norm.scale"]


def test_names_of_linen_trees():
    variables = _linen_variables()
    for tree in (
        variables,
        variables["params"],
        flax.core.freeze(variables),
        JAX.fr.params(variables),
        JAX.fr.params(flax.core.freeze(variables)),
        TrainState.create(apply_fn=_Linen().apply, params=variables["params"], tx=optax.identity()).params,
    ):
        assert _names(JAX, tree) == LINEN_NAMES


def test_names_of_nnx_trees():
    model = _Nnx()
    for tree in (
        model,
        nnx.state(model),
        nnx.state(model, nnx.Param),
        nnx.split(model, nnx.Param, ...)[1],
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        nnx.as_pure(nnx.state(model, nnx.Param)),
        JAX.fr.params(model),
        JAX.fr.params(nnx.state(model)),
    ):
        assert _names(JAX, tree) == NNX_NAMES


def test_nnx_variables_that_are_no_parameters_are_passed_over():
    model = _Nnx()
    for tree in (model, nnx.state(model)):
        everything = JAX.fr.l2(1.0).grad(tree), JAX.fr.prox_adam(0.1, JAX.fr.l1(0.1)).init(tree).mu
        for zeros in everything:
            assert (
                float(
                    jnp.sum(jnp.abs(zeros["norm"]["var"][...] if isinstance(zeros, nnx.State) else zeros.norm.var[...]))
                )
                == 0
            )
        new = JAX.fr.l1(1.0).prox(tree, 100.0)
        assert type(new) is type(tree)
        flat = dict(nnx.to_flat_state(nnx.state(new) if isinstance(new, nnx.Module) else new))
        assert float(flat["norm", "var"][...].sum()) == 2  # running variances start at 1
        assert float(jnp.abs(flat["hidden", "kernel"][...]).sum()) == 0
        assert jnp.issubdtype(flat["dropout", "rngs", "key"][...].dtype, jax.dtypes.prng_key)


def test_nnx_update_takes_params_back():
    model = _Nnx()
    params = JAX.fr.params(model)
    assert set(params) == {"hidden", "norm", "layers", "low_rank"}  # Param only
    nnx.update(model, JAX.fr.l1(1.0).prox(params, 1e3))
    assert all(float(jnp.abs(leaf).sum()) == 0 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert float(model.norm.var[...].sum()) == 2


def test_params_of_linen_variables_of_dataclasses_and_of_trees():
    variables = _linen_variables()
    assert JAX.fr.params(variables) is variables["params"]
    layer = JaxLayer(jnp.ones((1, 1)), jnp.arange(2))
    params = JAX.fr.params({"out": layer, "name": "net", "act": _plain, "key": jax.random.key(0)})
    assert params["out"].weight is layer.weight
    assert (params["out"].bias, params["name"], params["act"], params["key"]) == (None, None, None, None)
    assert params["out"].act == "relu"
    assert _names(JAX, params) == ["out.weight"]


class _Bare(nnx.Module):
    pass


@pytest.mark.parametrize("wrong", [None, {}, {"n": 3}, _plain, _Bare()], ids=lambda x: type(x).__name__)
def test_params_of_a_model_without_parameters_are_refused(wrong):
    with pytest.raises(TypeError, match=f"params: found no parameters in {type(wrong).__name__}"):
        JAX.fr.params(wrong)


def test_nnx_shared_variables_are_contained_once_in_a_state():
    model = _Nnx()
    model.layers.append(nnx.Linear(2, 1, rngs=nnx.Rngs(1)))
    model.layers[1].kernel = model.layers[0].kernel
    assert [name for name in _names(JAX, JAX.fr.params(model)) if "layers" in name] == [
        "layers.0.bias",
        "layers.0.kernel",
        "layers.1.bias",
    ]


# --- init and update ---


class _Recorder:
    """A transformation and a selector that write down the names they are shown."""

    def __init__(self):
        self.init: list[list[str]] = []
        self.update: list[list[str]] = []

    def transformation(self):
        def init(params):
            self.init.append(_names(JAX, params))
            return optax.EmptyState()

        def update(updates, state, params=None):
            self.update += [_names(JAX, updates), _names(JAX, params)]
            return updates, state

        return optax.GradientTransformation(init, update)

    def check(self, expected):
        assert self.init and self.update
        assert all(names == expected for names in (*self.init, *self.update))


def _ours(recorder, globs="*"):
    """Every transformation of ours whose state is shaped like the parameters, around a recorder."""
    fr = JAX.fr
    penalty = fr.l1(1e-3).on(globs)
    return optax.chain(
        recorder.transformation(),
        fr.add_penalty_gradient(fr.l2(1e-3).on(globs)),
        recorder.transformation(),
        fr.prox_sgd(0.1, penalty, momentum=0.9),
    ), optax.chain(recorder.transformation(), fr.prox_adam(0.1, penalty))


@pytest.mark.parametrize("which", [0, 1], ids=["prox_sgd", "prox_adam"])
def test_names_in_an_nnx_optimizer(which):
    recorder, model = _Recorder(), _Nnx()
    optimizer = nnx.Optimizer(model, _ours(recorder, ["*.kernel", "low_rank"])[which], wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(lambda model: (model(jnp.ones((3, 2))) ** 2).mean() + model.hidden.kernel.sum())(model)
        optimizer.update(model, gradients)

    before = model.hidden.kernel[...]
    for _ in range(2):
        step(model, optimizer)
    recorder.check(NNX_NAMES)
    assert float(jnp.abs(model.hidden.kernel[...] - before).min()) > 0.05


@pytest.mark.parametrize("which", [0, 1], ids=["prox_sgd", "prox_adam"])
@pytest.mark.parametrize("frozen", [False, True], ids=["dict", "FrozenDict"])
def test_names_in_a_linen_train_state(which, frozen):
    recorder = _Recorder()
    params = _linen_variables()["params"]
    params = flax.core.freeze(params) if frozen else params
    state = TrainState.create(apply_fn=None, params=params, tx=_ours(recorder, "*.kernel")[which])
    for _ in range(2):
        state = jax.jit(lambda state: state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params)))(state)
    recorder.check(LINEN_NAMES)
    assert float((params["hidden"]["kernel"] - state.params["hidden"]["kernel"]).min()) > 0.05


@pytest.mark.parametrize("which", [0, 1], ids=["prox_sgd", "prox_adam"])
@pytest.mark.parametrize(
    "wrapper",
    ["masked", "partition", "flatten", pytest.param("MultiSteps", marks=pytest.mark.relaxed_promotion)],
)
def test_names_in_optax_wrappers(which, wrapper):
    recorder = _Recorder()
    ours = _ours(recorder)[which]
    variables = jax.tree.map(jnp.asarray, _linen_variables())
    kernels = jax.tree.map(lambda x: x.ndim == 2, variables)
    labels = jax.tree.map(lambda x: "ours" if x else "theirs", kernels)
    names = [name for name in LINEN_NAMES if name.endswith("kernel")]
    if wrapper == "masked":
        transformation = optax.masked(ours, kernels)
    elif wrapper == "partition":
        transformation = optax.partition({"ours": ours, "theirs": optax.sgd(0.1)}, labels)
    elif wrapper == "MultiSteps":
        transformation, names = optax.MultiSteps(ours, 2).gradient_transformation(), LINEN_NAMES
    else:
        transformation, names = optax.flatten(ours), [""]
    state = transformation.init(variables)
    gradients = jax.tree.map(jnp.ones_like, variables)
    for _ in range(2):
        updates, state = jax.jit(transformation.update)(gradients, state, variables)
    recorder.check(names)
    assert float(updates["params"]["hidden"]["kernel"].max()) < -0.05


def test_inject_hyperparams_takes_a_penalty():
    params = {"w": jnp.ones(2)}
    transformation = optax.inject_hyperparams(JAX.fr.prox_adam)(learning_rate=0.5, penalty=JAX.fr.l1(1e-3))
    state = transformation.init(params)
    assert float(state.hyperparams["learning_rate"]) == 0.5
    updates, _ = transformation.update({"w": jnp.ones(2)}, state, params)
    np.testing.assert_allclose(updates["w"], -0.5, rtol=2e-3)
