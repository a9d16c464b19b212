"""What a step may be told of its batch, its loss and its head: each against plain torch, in float64."""

import pytest
import torch
from support.training_kit import TokenModel, assert_same, gradients, mlp, samples
from torch import nn
from torch.nn import functional as F

import selbp

STRATEGIES = ["rows", "recompute"]
EXACT = 1e-12


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def weighted(losses, selection):
    return (losses.index_select(0, selection.indices) * selection.weights).sum()


# ------------------------------------------------------------------------------------------------- normalizer


def ragged(n=6, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (n, length), generator=generator)
    labels = ids.clone()
    for i in range(n):
        labels[i, : (3 * i + seed) % length] = -100
    return ids, labels


def token_losses(model, ids, labels):
    entries = F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return entries.sum(1)


@pytest.mark.parametrize("backward", STRATEGIES)
@pytest.mark.parametrize("name", ["normalizer", "num_items_in_batch"])
def test_accumulated_gradients_are_those_of_the_whole_batch(backward, name):
    model = TokenModel()
    parts = [ragged(seed=s) for s in range(3)]
    count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in parts)
    want = gradients(model, sum(token_losses(model, *part).sum() for part in parts) / count)
    step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, loss="causal_lm", backward=backward)
    model.zero_grad()
    for number in (count, torch.tensor(count), torch.tensor([float(count)])):
        model.zero_grad()
        for ids, labels in parts:
            step({"input_ids": ids, "labels": labels}, **{name: number}).backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, want, EXACT)


@pytest.mark.parametrize("options", [{}, {"head_gradient": "full"}, {"cut": "mix"}], ids=["rule", "full-head", "cut"])
@pytest.mark.parametrize("backward", STRATEGIES)
def test_a_normalizer_scales_what_the_step_gives_without_one(backward, options):
    model, (ids, labels) = TokenModel(), ragged()
    if backward == "recompute" and "cut" in options:
        model.mix.flatten_parameters()
    step = selbp.SelectiveBackprop(
        model, selector=selbp.GradientMatching(), keep=0.5, loss="causal_lm", backward=backward, **options
    )
    alone = gradients(model, step(ids, labels))
    share = int((labels[:, 1:] != -100).sum()) / 100
    scaled = gradients(model, step(ids, labels, normalizer=100))
    assert_same(scaled, {name: gradient * share for name, gradient in alone.items()}, EXACT)


def test_a_normalizer_counts_class_weights_and_samples_in_their_own_units():
    model, (x, y) = mlp(), samples()
    weight = torch.rand(5) + 0.5
    for loss, options, whole in (
        ("cross_entropy", {"class_weight": weight}, F.cross_entropy(model(x), y, weight)),
        (nn.CrossEntropyLoss(reduction="none"), {}, F.cross_entropy(model(x), y)),
    ):
        want = gradients(model, whole)
        step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, loss=loss, **options)
        total = float(weight[y].sum()) if options else len(y)
        model.zero_grad()
        for part in (slice(0, 5), slice(5, 24)):
            step(x[part], y[part], normalizer=total).backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, want, 1e-6 if options else EXACT)


def test_a_minibatch_without_targets_adds_nothing():
    model = TokenModel()
    ids, labels = ragged()
    step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, loss="causal_lm", backward="recompute")
    found = gradients(model, step(ids, torch.full_like(labels, -100), normalizer=0))
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (float("nan"), ValueError), (True, TypeError), ("3", TypeError), (torch.ones(2), ValueError)],
    ids=["negative", "nan", "bool", "string", "two"],
)
def test_a_wrong_normalizer_is_refused(value, error):
    step = selbp.SelectiveBackprop(mlp(), selector=selbp.Full(), keep=1.0)
    with pytest.raises(error, match="normalizer must be a number"):
        step(*samples(), normalizer=value)
    with pytest.raises(ValueError, match="two names of one option"):
        step(*samples(), normalizer=1, num_items_in_batch=1)


# -------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("options", [{}, {"head_gradient": "full"}, {"cut": "1"}], ids=["rule", "full-head", "cut"])
@pytest.mark.parametrize("backward", STRATEGIES)
def test_a_selection_is_trained_on_as_given(backward, options):
    model, (x, y) = mlp(), samples()
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, backward=backward, **options)
    step(x, y).backward()
    selection = (step.report.cut if "cut" in options else step.report).selection
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # as SAM climbs
    losses = F.cross_entropy(model(x), y, reduction="none")
    want = gradients(model, weighted(losses, selection))
    got = gradients(model, step(x, y, selection=selection))
    if "head_gradient" in options:
        whole = gradients(model, F.cross_entropy(model(x), y))
        want |= {name: whole[name] for name in ("2.weight", "2.bias")}
    assert_same(got, want, 1e-10)
    assert step.report.selection.indices.tolist() == selection.indices.tolist()
    assert step.optimizer_step == 1  # both passes are of one step


def test_a_selection_needs_no_scoring_and_no_schedule():
    model, (x, y) = mlp(), samples()
    ran = []
    model.register_forward_hook(lambda module, args, output: ran.append(len(output)))
    step = selbp.SelectiveBackprop(
        model, selector=selbp.TopLoss(), keep=0.25, backward="recompute", schedule=selbp.Schedule(start=9)
    )
    step(x, y, selection=selbp.Selection(torch.tensor([3, 1]), torch.tensor([0.5, 0.5])))
    assert ran == [2] and step.report.k == 2 and not step.report.scored


@pytest.mark.parametrize(
    ("selection", "error", "words"),
    [
        ((torch.tensor([0]), torch.ones(1)), TypeError, "selection must be a selbp.Selection"),
        (selbp.Selection(torch.tensor([0, 24]), torch.ones(2)), ValueError, "must name rows of the 24 samples"),
        (selbp.Selection(torch.tensor([0, -1]), torch.ones(2)), ValueError, "must name rows of the 24 samples"),
        (selbp.Selection(torch.tensor([0, 1]), torch.ones(1)), ValueError, r"indices \(k,\) int64 and weights"),
        (selbp.Selection(torch.tensor([0]), torch.ones(1).long()), TypeError, "weights must be floating"),
    ],
    ids=["tuple", "too-great", "negative", "lengths", "integers"],
)
def test_a_wrong_selection_is_refused(selection, error, words):
    step = selbp.SelectiveBackprop(mlp(), selector=selbp.Full(), keep=1.0)
    with pytest.raises(error, match=words):
        step(*samples(), selection=selection)


# ------------------------------------------------------------------------------------------- target and inputs


class Answers(nn.Module):
    """Start and end of an answer among the positions; derives nothing from the targets."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 2)

    def forward(self, ids):
        start, end = self.head(self.embed(ids)).unbind(-1)
        return {"start": start, "end": end}


def answer_losses(output, target):
    entries = [F.cross_entropy(output[name], target[f"{name}_positions"], reduction="none") for name in output]
    return sum(entries) / 2


@pytest.mark.parametrize("backward", STRATEGIES)
def test_several_targets_of_a_dict_batch(backward):
    model, n = Answers(), 12
    batch = {
        "ids": torch.randint(0, 11, (n, 6)),
        "start_positions": torch.randint(0, 6, (n,)),
        "end_positions": torch.randint(0, 6, (n,)),
    }
    keys = ("start_positions", "end_positions")
    step = selbp.SelectiveBackprop(
        model, selector=selbp.GradientMatching(), keep=0.5, loss=answer_losses, backward=backward, target_keys=keys
    )
    got = gradients(model, step(batch))
    losses = answer_losses(model(batch["ids"]), batch)
    assert_same(got, gradients(model, weighted(losses, step.report.selection)), 1e-10)
    with pytest.raises(ValueError, match="target_keys: the batch has no 'end_positions'"):
        step({"ids": batch["ids"], "start_positions": batch["start_positions"]})


class Shifting(nn.Module):
    """Derives its decoder's inputs from the labels, as T5 does."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 11)

    def forward(self, input_ids, labels):
        decoder = torch.cat([torch.full_like(labels[:, :1], 11), labels[:, :-1].clamp(min=0)], 1)
        return self.head(self.embed(decoder) + self.embed(input_ids).mean(1, keepdim=True))


@pytest.mark.parametrize("backward", STRATEGIES)
def test_labels_that_the_model_needs(backward):
    model, (ids, labels) = Shifting(), ragged()
    step = selbp.SelectiveBackprop(
        model, selector=selbp.GradientMatching(), keep=0.5, backward=backward, pass_labels=True
    )
    got = gradients(model, step({"input_ids": ids, "labels": labels}))
    losses = F.cross_entropy(model(ids, labels).transpose(1, 2), labels, reduction="none").sum(1)
    losses = losses * len(ids) / (labels != -100).sum()
    assert_same(got, gradients(model, weighted(losses, step.report.selection)), 1e-10)


class TimeFirst(nn.Module):
    """Reads (T, n, d), a state (1, n, d) and a table (1, d) that belongs to no sample."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.GRU(4, 6), nn.Linear(6, 5)

    def forward(self, x, state, table):
        assert x.shape[0] == 7 and state.shape[0] == 1 and table.shape[0] == 1
        x.view(-1)  # contiguous, as the caller gave it
        return self.head(self.mix(x + table, state)[0][-1])


@pytest.mark.parametrize("backward", [*STRATEGIES, "auto"])
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_samples_in_another_dim_and_inputs_without_samples(backward, kind):
    model, n = TimeFirst(), 12
    inputs = (torch.randn(7, n, 4), torch.randn(1, n, 6), torch.randn(1, 4))
    y = torch.randint(0, 5, (n,))
    names = ("x", "state", "table") if kind == "dict" else (0, 1, 2)
    given = dict(zip(names, inputs, strict=True)) if kind == "dict" else inputs
    for rule in (selbp.GradientMatching(), selbp.Random()):
        step = selbp.SelectiveBackprop(
            model, selector=rule, keep=0.5, backward=backward, shared=names[2], batch_dims={names[0]: 1, names[1]: -2}
        )
        got = gradients(model, step(given, y))
        losses = F.cross_entropy(model(*inputs), y, reduction="none")
        assert_same(got, gradients(model, weighted(losses, step.report.selection)), 1e-10)


def test_a_shared_input_that_the_model_edits_is_whole_for_the_second_forward():
    class Editing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 5)

        def forward(self, x, table):
            table.mul_(2)
            return self.head(x * table)

    model, (x, y), table = Editing(), samples(), torch.rand(1, 12)
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25, backward="recompute", shared=[1])
    got = gradients(model, step((x, table.clone()), y))
    losses = F.cross_entropy(model(x, table), y, reduction="none")
    assert_same(got, gradients(model, weighted(losses, step.report.selection)), 1e-10)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shared": 3.5}, TypeError, "shared must hold names"),
        ({"shared": [True]}, TypeError, "shared must hold names"),
        ({"batch_dims": ["x"]}, TypeError, "batch_dims must be a dict"),
        ({"batch_dims": {"x": "1"}}, TypeError, r"batch_dims\['x'\] must be an int"),
        ({"batch_dims": {"x": 1}, "shared": "x"}, ValueError, "'x' is in shared"),
        ({"target_keys": []}, ValueError, "target_keys must name at least one"),
        ({"target_keys": [1]}, TypeError, "target_keys must hold names"),
        ({"pass_labels": 1}, TypeError, "pass_labels must be True or False"),
        ({"aux_weight": -1}, ValueError, "aux_weight must be finite and at least 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        selbp.SelectiveBackprop(mlp(), selector=selbp.Full(), keep=1.0, **options)


def test_names_that_the_batch_has_not_are_refused():
    for options in ({"shared": "z"}, {"batch_dims": {"z": 1}}):
        step = selbp.SelectiveBackprop(mlp(), selector=selbp.Full(), keep=1.0, **options)
        with pytest.raises(ValueError, match="the batch has no 'z'; it has 'input'"):
            step({"input": samples()[0]}, samples()[1])
    step = selbp.SelectiveBackprop(mlp(), selector=selbp.Full(), keep=1.0, shared=0)
    with pytest.raises(ValueError, match="one at least must have samples"):
        step(*samples())


# ------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("backward", STRATEGIES)
@pytest.mark.parametrize("weighted_classes", [False, True], ids=["plain", "weights-smoothing"])
def test_class_probabilities(backward, weighted_classes):
    model, (x, _) = mlp(), samples()
    soft = torch.rand(24, 5).softmax(1)
    options = {"class_weight": torch.rand(5) + 0.5, "label_smoothing": 0.1} if weighted_classes else {}
    names = {"class_weight": "weight", "label_smoothing": "label_smoothing"}
    plain = {names[name]: value for name, value in options.items()}
    step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, backward=backward, **options)
    assert_same(gradients(model, step(x, soft)), gradients(model, F.cross_entropy(model(x), soft, **plain)), 1e-10)
    assert step.report.accuracy == float((model(x).argmax(1) == soft.argmax(1)).double().mean())
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, backward=backward, **options)
    got = gradients(model, step(x, soft))
    losses = F.cross_entropy(model(x), soft, reduction="none", **plain)
    assert_same(got, gradients(model, weighted(losses, step.report.selection)), 1e-10)
    assert step.report.relative_residual < 1


@pytest.mark.parametrize("class_dim", [1, -1])
def test_class_probabilities_of_positions_need_the_dim_of_the_classes(class_dim):
    model = nn.Conv1d(3, 5, 1) if class_dim == 1 else nn.Linear(3, 5)
    x = torch.randn(6, 3, 4) if class_dim == 1 else torch.randn(6, 4, 3)
    soft = torch.rand_like(model(x)).softmax(class_dim)
    step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, class_dim=class_dim)
    z, wanted = (model(x), soft) if class_dim == 1 else (model(x).transpose(1, 2), soft.transpose(1, 2))
    assert_same(gradients(model, step(x, soft)), gradients(model, F.cross_entropy(z, wanted)), 1e-10)
    with pytest.raises(ValueError, match="pass class_dim=1 or class_dim=-1"):
        selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0)(x, soft)


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("column", ["output", "target"])
@pytest.mark.parametrize("backward", [*STRATEGIES, "auto"])
def test_one_output_with_and_without_a_dim_of_its_own(loss, column, backward):
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))
    if column == "target":
        model.append(nn.Flatten(0))
    x, y = torch.randn(24, 12), torch.rand(24)
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, loss=loss, backward=backward)
    got = gradients(model, step(x, y if column == "output" else y[:, None]))
    function = F.mse_loss if loss == "mse" else F.binary_cross_entropy_with_logits
    losses = function(model(x).reshape(24), y, reduction="none")
    assert_same(got, gradients(model, weighted(losses, step.report.selection)), 1e-10)


class TinyForCausalLM(TokenModel):
    pass


def test_a_causal_model_with_the_loss_of_unshifted_labels_is_warned_of():
    with pytest.warns(UserWarning, match='loss="causal_lm"'):
        selbp.SelectiveBackprop(TinyForCausalLM(), selector=selbp.Full(), keep=1.0)
    selbp.SelectiveBackprop(TinyForCausalLM(), selector=selbp.Full(), keep=1.0, loss="causal_lm")  # warns of nothing


# --------------------------------------------------------------------------------------------- auxiliary loss


class Router(nn.Module):
    """Two experts, their load balancing as a loss of all rows of a forward."""

    router_aux_loss_coef = 0.25

    def __init__(self):
        super().__init__()
        self.gate, self.experts, self.head = nn.Linear(12, 2), nn.Linear(12, 16), nn.Linear(8, 5)

    def forward(self, x):
        share = self.gate(x).softmax(1)
        hidden = (self.experts(x).view(len(x), 2, 8) * share[:, :, None]).sum(1).tanh()
        return {"logits": self.head(hidden), "aux_loss": share.mean(0).square().sum()}


@pytest.mark.parametrize("backward", [*STRATEGIES, "auto", "cut"])
@pytest.mark.parametrize("weight", [None, 0.0, 2.0], ids=["the-models", "none", "given"])
def test_the_models_auxiliary_loss_is_taken(backward, weight):
    model, (x, y) = Router(), samples()
    place = {"cut": "experts", "backward": "rows"} if backward == "cut" else {"backward": backward}
    step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, aux_weight=weight, **place)
    output = model(x)
    factor = model.router_aux_loss_coef if weight is None else weight
    want = gradients(model, F.cross_entropy(output["logits"], y) + factor * output["aux_loss"])
    assert_same(gradients(model, step(x, y)), want, 1e-10)


@pytest.mark.parametrize("backward", STRATEGIES)
def test_the_auxiliary_loss_is_of_the_rows_that_train(backward):
    model, (x, y) = Router(), samples()
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, backward=backward)
    got = gradients(model, step(x, y, normalizer=48))
    selection, output = step.report.selection, model(x)
    rows = output if backward == "rows" else model(x[selection.indices])
    losses = F.cross_entropy(output["logits"], y, reduction="none")
    want = weighted(losses, selection) + model.router_aux_loss_coef * rows["aux_loss"]
    assert_same(got, gradients(model, want / 2), 1e-10)


def test_auto_recomputes_a_model_with_an_auxiliary_loss():
    step = selbp.SelectiveBackprop(Router(), selector=selbp.TopLoss(), keep=0.25)
    step(*samples())
    assert step.report.backward == "recompute" and "auxiliary loss" in step.report.backward_reason


def test_an_auxiliary_loss_that_is_no_scalar_is_refused():
    class Wrong(Router):
        def forward(self, x):
            return super().forward(x) | {"aux_loss": x.sum(1)}

    step = selbp.SelectiveBackprop(Wrong(), selector=selbp.Full(), keep=1.0)
    with pytest.raises(ValueError, match="aux_loss must be a floating scalar"):
        step(*samples())


def test_a_callable_loss_sees_the_auxiliary_one_itself():
    model, (x, y) = Router(), samples()
    step = selbp.SelectiveBackprop(
        model,
        selector=selbp.Full(),
        keep=1.0,
        backward="recompute",
        loss=lambda output, target: F.cross_entropy(output["logits"], target, reduction="none"),
    )
    assert_same(gradients(model, step(x, y)), gradients(model, F.cross_entropy(model(x)["logits"], y)), 1e-10)


# ------------------------------------------------------------------------------------------------------- head


class Squeeze(nn.Module):
    """Ends in a 1x1 convolution over classes, averaged over positions, as SqueezeNet does."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(2, 6, 3, padding=1)
        self.classifier = nn.Sequential(nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        return self.classifier(self.features(x).relu())


@pytest.mark.parametrize("backward", STRATEGIES)
@pytest.mark.parametrize("head_gradient", ["subset", "full"])
def test_a_head_of_1x1_convolutions(backward, head_gradient):
    model, x, y = Squeeze(), torch.randn(12, 2, 4, 4), torch.randint(0, 5, (12,))
    step = selbp.SelectiveBackprop(
        model, selector=selbp.GradientMatching(), keep=0.25, backward=backward, head_gradient=head_gradient
    )
    assert step.head is model.classifier[0]
    got = gradients(model, step(x, y))
    losses = F.cross_entropy(model(x), y, reduction="none")
    each = [torch.autograd.grad(one, list(step.head.parameters()), retain_graph=True) for one in losses]
    flat = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in each])
    mean, selection = flat.mean(0), step.report.selection
    error = mean - (flat[selection.indices] * selection.weights[:, None]).sum(0)
    assert step.report.relative_residual == pytest.approx(float(error.norm() / mean.norm()), rel=1e-6)
    want = gradients(model, weighted(losses, selection))
    if head_gradient == "full":
        whole = gradients(model, F.cross_entropy(model(x), y))
        want |= {name: whole[name] for name in whole if name.startswith("classifier")}
    assert_same(got, want, 1e-9)


class LowRank(nn.Module):
    """A linear layer with an adapter on it, as LoRA builds it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, outputs, bias=False)})

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.mark.parametrize("backward", STRATEGIES)
def test_a_head_with_an_adapter_is_the_adapted_layer(backward):
    model, (x, y) = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), LowRank(16, 5)), samples()
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, backward=backward)
    assert step.head is model[2]
    got = gradients(model, step(x, y))
    plain = nn.Linear(16, 5)  # the merged head
    with torch.no_grad():
        plain.weight.copy_(model[2].weight + model[2].lora_B["default"].weight @ model[2].lora_A["default"].weight)
        plain.bias.copy_(model[2].bias)
    merged = selbp.SelectiveBackprop(
        nn.Sequential(model[0], model[1], plain), selector=selbp.GradientMatching(), keep=0.25, backward=backward
    )
    merged(x, y)
    assert step.report.selection.indices.tolist() == merged.report.selection.indices.tolist()
    losses = F.cross_entropy(model(x), y, reduction="none")
    assert_same(got, gradients(model, weighted(losses, step.report.selection)), 1e-10)
    with pytest.raises(ValueError, match="LowRank is an adapter"):
        selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25, head_gradient="full")


class ArcFace(nn.Module):
    """Cosines with a bare parameter: there is no head layer."""

    def __init__(self, own_module):
        super().__init__()
        if own_module:
            self.margin = nn.Module()
            self.margin.weight = nn.Parameter(torch.randn(5, 8))
        else:
            self.weight = nn.Parameter(torch.randn(5, 8))
        self.embed = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x):
        weight = self.margin.weight if hasattr(self, "margin") else self.weight
        return F.linear(F.normalize(self.embed(x)), F.normalize(weight))


@pytest.mark.parametrize("own_module", [False, True], ids=["of-the-model", "of-a-module"])
def test_a_raw_parameter_is_named_and_no_layer_is_taken_for_the_head(own_module):
    model, (x, y) = ArcFace(own_module), samples()
    name = "margin.weight" if own_module else "weight"
    with pytest.raises(ValueError, match=f"the parameter '{name}' of the model .* pass head='embed.2'"):
        selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25)
    for options in ({"head": "embed.2"}, {"cut": "embed.2"}):
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, **options)
        step(x, y).backward()
    assert selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25).head is None


def test_parameters_that_do_not_follow_the_head_leave_it_clear():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.place = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(1, 3, 8))
            self.table, self.head = nn.Parameter(torch.zeros(7, 12)), nn.Linear(12, 5)

    model = Positions()
    assert selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25).head is model.head


# ---------------------------------------------------------------------------------------------- global target


def test_one_process_is_a_world_of_one():
    model, (x, y) = mlp(), samples()
    chosen = []
    for target in ("global", "local"):
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, target=target)
        step(x, y)
        chosen.append((step.report.selection, step.report.relative_residual))
    torch.testing.assert_close(chosen[0][0], chosen[1][0])
    assert chosen[0][1] == pytest.approx(chosen[1][1], rel=1e-6)


@pytest.mark.parametrize("bounds", ["cu_seq_lens_q", "position_ids"])
def test_a_packed_row_is_a_sample_a_sequence(bounds):
    """As the same sequences, padded."""
    ids, lengths = torch.randint(0, 11, (1, 12)), [5, 1, 4, 2]
    padded = torch.zeros(4, 5, dtype=torch.int64), torch.full((4, 5), -100)
    for i, row in enumerate(ids[0].split(lengths)):
        padded[0][i, : len(row)] = padded[1][i, : len(row)] = row
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    packed = {"input_ids": ids, "labels": ids}
    if bounds == "position_ids":
        packed["position_ids"] = torch.cat([torch.arange(k) for k in lengths])[None]
    else:
        packed |= {bounds: torch.tensor([0, 5, 6, 10, 12], dtype=torch.int32), "max_length_q": 5}

    class Masked(TokenModel):
        def forward(self, input_ids, attention_mask, position_ids=None):
            seen.append(attention_mask.sum(1).tolist())
            return super().forward(input_ids)

    for backward in ("rows", "recompute"):
        found = []
        for batch in (packed, {"input_ids": padded[0], "labels": padded[1], "attention_mask": mask.long()}):
            torch.manual_seed(0)
            model, seen = Masked(), []
            step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=4, loss="causal_lm", backward=backward)
            found.append((gradients(model, step(dict(batch))), step.report.loss, step.report.n))
            assert seen[0] == lengths
        assert found[0][1:] == found[1][1:]
        assert found[0][2] == 4
        assert_same(found[0][0], found[1][0], rtol=1e-12)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, r"the bounds are \[0, 3, 5\], not increasing from 0 to 6"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 3, 6])}, "not increasing"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6]), "cu_seq_lens_k": torch.tensor([0, 2, 6])}, "different bounds"),
        ({"max_length_q": 3}, "nor position_ids tell where one ends"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6]), "lengths": torch.tensor([3, 3])}, r"'lengths' is a tensor \(2,\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 6]), "attention_mask": torch.ones(1, 1, 6, 6)}, "'attention_mask'"),
        ({"position_ids": torch.tensor([[2, 3, 4, 0, 1, 0]])}, "not increasing from 0"),
    ],
    ids=["short", "falling", "keys", "no-bounds", "other", "mask", "position"],
)
def test_a_packed_row_that_cannot_be_taken_apart_is_named(entries, named):
    ids = torch.randint(0, 11, (1, 6))
    step = selbp.SelectiveBackprop(TokenModel(), selector=selbp.TopLoss(), keep=0.5, loss="causal_lm")
    with pytest.raises(ValueError, match=rf"the batch is packed .*Pad instead.*{named}"):
        step({"input_ids": ids, "labels": ids, **entries})
