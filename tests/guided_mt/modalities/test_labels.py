"""Labels as a modality, several modalities and form any: what is encoded, what the network is shown, where gradients go."""

from __future__ import annotations

import math

import pytest
import torch
from test_model import inputs, randomise, tiny
from torch import nn

from guided_mt.diffusion.network import ModelOutput
from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.respacing import create_gaussian_diffusion
from guided_mt.generation.build import build_diffusion, build_modalities
from guided_mt.modalities import ImageModality, Images, LabelModality, LabelTokens, Modality, RandomLabel
from guided_mt.modalities.tokens import rms
from guided_mt.networks.create import create_model
from guided_mt.networks.heads import ClassifierHead, HeadInputs
from guided_mt.networks.model import VARIANTS
from guided_mt.runs import checkpoint
from guided_mt.runs.distributed import Processes
from guided_mt.training.objective import multi_task_losses
from guided_mt.training.terms.conflict import conflict_names, task_conflict

CLASSES = 7  # of test_model's `tiny`
E_HEAD = ["--mt_label_head", "E", "--classifier_width", "64", "--classifier_depth", "1"]
E_HEAD += ["--classifier_attention_resolutions", "4", "--classifier_pool", "attention"]


def trained(*flags: str):
    """(config, model, modalities) of a tiny model in which no layer is zero."""
    config, model = tiny(*flags)
    randomise(model)
    return config, model, build_modalities(config, model)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- the modality


def test_loss_and_log_probability_are_the_cross_entropy():
    """For ids and for probabilities, with those of a class as its id; the estimate is the softmax."""
    label, logits = LabelModality(4), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    ids, soft = torch.tensor([0, 3, 1, 1, 2]), torch.rand(5, 4).softmax(1)
    log_p = logits.log_softmax(1)
    close(label.loss(logits, ids), -log_p[torch.arange(5), ids])
    close(label.loss(logits, soft), -(soft * log_p).sum(1))
    close(label.loss(logits, nn.functional.one_hot(ids, 4).float()), label.loss(logits, ids))
    t = torch.arange(5)
    assert torch.equal(label.log_prob(logits, ids, t), -label.loss(logits, ids))
    assert torch.equal(label.log_prob(logits, soft, t), -label.loss(logits, soft))
    close(label.estimate(logits), log_p.exp())


def test_prior_is_one_class_each():
    streams = SampleStreams(torch.arange(7000))
    prior = LabelModality(CLASSES).prior((3, 8, 8), streams)
    assert prior.shape == (7000, CLASSES) and set(prior.unique().tolist()) == {0.0, 1.0}
    assert (prior.sum(1) == 1).all() and (prior.mean(0) - 1 / CLASSES).abs().max() < 4 * math.sqrt(0.13 / 7000)


def test_random_label_knows_nothing_of_the_image():
    """Uniform, independent of the class and the pixels, and a function of the sample's own stream."""
    label, count = RandomLabel(4, name="random-label"), 8000
    classes = torch.arange(count) % 4
    drawn = label.from_batch(Images(torch.zeros(count, 1, 1, 1), classes), SampleStreams(torch.arange(count)))
    table = torch.stack([torch.bincount(drawn[classes == k], minlength=4) for k in range(4)]).double()
    assert float(((table - count / 16) ** 2 / (count / 16)).sum()) < 38  # chi-squared with 15 degrees: p = 0.001
    other = label.from_batch(Images(torch.ones(count, 1, 1, 1)), SampleStreams(torch.arange(count)))
    assert torch.equal(drawn, other)
    assert not torch.equal(drawn, label.from_batch(Images(torch.zeros(count, 1, 1, 1)), SampleStreams(1, classes)))


def test_images_without_classes_are_refused():
    with pytest.raises(ValueError, match="needs images with classes"):
        LabelModality(3).from_batch(Images(torch.zeros(1, 3, 8, 8)), SampleStreams(0))


# ---------------------------------------------------------------- E(x)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", ["label", "masked,label,representation"])
def test_ways_of_encoding_labels_agree(task, variant):
    """Each distinct class once (few samples), all classes once (many), each sample by itself, a class id as its one-hot vector,
    and probabilities as the expected embedding."""
    _, model, modalities = trained("--mt_task", task, "--mt_variant", variant)
    label = modalities["label"]
    few, many = torch.tensor([5, 2, 5, 0]), torch.arange(20) % CLASSES
    for ids in (few, many):
        encoded = label.encode(ids)
        for other in (
            Modality.encode(label, ids),
            torch.cat([label.encode(x[None]) for x in ids]),
            label.encode(nn.functional.one_hot(ids, CLASSES).float()),
        ):
            assert rms(encoded - other).max() < 1e-5 * rms(encoded).min()  # float32 in batches of another size
    assert (label.encode(few)[0] - label.encode(few)[1]).abs().max() > 1e-3
    soft = torch.full((1, CLASSES), 1 / CLASSES)
    tokens = model.context_in["label"]
    close(tokens(soft), tokens.weight.mean(0).expand(1, 1, -1), 1e-6)
    assert label.encode(soft).shape == (1, 3, 8, 8)


def counting(classes: int, refresh: int = 1):
    """A label whose encoder writes down what it is asked, and the scale of whose encodings can be set."""
    label, asked, scale = LabelModality(classes, refresh), [], torch.ones(1)

    def encoder(x):
        asked.append(x.tolist())
        return scale * x.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)

    label.encoder = encoder
    return label, asked, scale


def flat(parts: list[list[int]]) -> list[int]:
    return [x for part in parts for x in part]


def test_each_distinct_label_is_encoded_once():
    label, asked, _ = counting(100)
    assert label.encode(torch.tensor([9, 4, 9, 9, 4]))[:, 0, 0, 0].tolist() == [9, 4, 9, 9, 4]
    assert asked == [[4, 9]]
    asked.clear()
    label.encode(torch.arange(250) % 100)
    assert flat(asked) == list(range(100)) and max(len(part) for part in asked) <= 64


def test_the_table_is_new_every_k_steps():
    """Between refreshes the weights move on and the table doesn't; a resumed run goes on with the table it had."""
    label, asked, scale = counting(5, refresh=3)
    ids, seen = torch.tensor([4, 1]), []
    for step in range(7):
        scale.fill_(step + 1.0)
        label.before_step(step, Processes())
        seen.append(label.encode(ids)[:, 0, 0, 0].tolist())
        if step == 4:
            state = {key: x.clone() for key, x in label.state_dict().items()}
    assert seen == [[4.0 * k, 1.0 * k] for k in (1, 1, 1, 4, 4, 4, 7)]
    assert flat(asked) == [0, 1, 2, 3, 4] * 3

    resumed, asked, scale = counting(5, refresh=3)
    resumed.load_state_dict(state)
    scale.fill_(6.0)
    resumed.before_step(5, Processes())
    assert resumed.encode(ids)[:, 0, 0, 0].tolist() == [16.0, 4.0] and not asked


def test_refresh_1_is_exact():
    label, _, scale = counting(5)
    for step in range(3):
        scale.fill_(step + 1.0)
        label.before_step(step, Processes())
        assert label.encode(torch.tensor([4]))[0, 0, 0, 0] == 4.0 * (step + 1)
    assert label.state_dict() == {} and label.table is None


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_table(world_size):
    """Each encodes its part of the classes; together, in rank order, they are the table of one process."""
    parts = []
    for rank in range(world_size):
        label, asked, _ = counting(5, refresh=2)
        process = type("Rank", (Processes,), {"all_gather": lambda self, x: parts.append(x) or x})(rank, world_size)
        label.before_step(0, process)
        assert len(flat(asked)) == math.ceil(5 / world_size)
    assert torch.cat(parts)[:5, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_the_encoder_pass_leaves_no_trace():
    """No gradient, no dropout, and afterwards each dropout layer as it was, also when the pass fails."""
    config, model, modalities = trained("--mt_task", "label", "--mt_variant", "U", "--dropout", "0.5")
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert dropouts and config.dropout == 0.5
    model.train()
    dropouts[0].eval()
    modes = [m.training for m in model.modules()]
    ids = torch.tensor([1, 2])
    encoding = modalities["label"].encode(ids)
    assert torch.equal(encoding, modalities["label"].encode(ids)) and not encoding.requires_grad
    with pytest.raises(IndexError):
        model.encode_modality("label", torch.tensor([CLASSES]))
    assert [m.training for m in model.modules()] == modes
    z, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 5])
    assert not torch.equal(model(z, t).output, model(z, t).output)
    model.eval()
    assert torch.equal(encoding, modalities["label"].encode(ids))


def test_scale_of_the_encoding():
    """ADM's output layer starts at zero, and so does E(y); `rms` brings a trained one to root mean square 1."""
    config, model = tiny("--mt_task", "label", "--mt_variant", "U", "--mt_encoding_norm", "rms")
    assert not build_modalities(config, model)["label"].encode(torch.arange(CLASSES)).any()
    randomise(model)
    scaled = build_modalities(config, model)["label"].encode(torch.arange(3))
    plain = model.encode_modality("label", torch.arange(3))
    close(scaled, plain / plain.square().mean((1, 2, 3), keepdim=True).sqrt())
    close(rms(scaled), torch.ones(3))


# ---------------------------------------------------------------- what the network is shown


def test_a_soft_label_of_one_class_is_that_class():
    _, model, _ = trained("--mt_task", "label", "--mt_variant", "X")
    z, t, ids = torch.randn(3, 3, 8, 8), torch.tensor([0, 400, 999]), torch.tensor([6, 0, 2])
    hard, soft = model(z, t, {"label": ids}), model(z, t, {"label": nn.functional.one_hot(ids, CLASSES).float()})
    close(hard.output, soft.output, 1e-6)
    assert not torch.allclose(hard.output, model(z, t, {"label": ids.flip(0)}).output)
    mixed = LabelTokens(3, 5)
    p = torch.tensor([[0.2, 0.3, 0.5]])
    close(mixed(p)[0, 0], p[0] @ mixed.weight)


def test_a_label_in_the_frame_shows_the_null_token():
    """Form any: a sample without its label sees what every such sample sees, whatever the label is; one with it doesn't."""
    _, model, _ = trained("--mt_task", "label", "--mt_variant", "any")
    z, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 500])
    without = model(z, t, {}).output
    for ids in (torch.tensor([1, 2]), torch.tensor([4, 0])):
        shown = torch.tensor([False, True])
        output = model(z, t, {"label": ids}, given={"label": shown}).output
        assert torch.equal(output[0], without[0]) and not torch.allclose(output[1], without[1])
    with torch.no_grad():
        model.null_token["label"].add_(1.0)
    assert not torch.allclose(model(z, t, {}).output, without)


def test_a_modality_of_several_tokens_that_is_not_given_shows_one_null_token():
    """As where nothing is given at all: its null token, repeated, would weigh more in the attention."""
    _, model, _ = trained("--mt_task", "label", "--mt_variant", "any")
    width = model.null_token["label"].shape[1]
    model.context_in["label"] = nn.Sequential(nn.Embedding(CLASSES, 3 * width), nn.Unflatten(1, (3, width)))
    z, t, ids = torch.randn(2, 3, 8, 8), torch.tensor([10, 500]), torch.tensor([1, 2])
    shown, everything = torch.tensor([False, True]), model(z, t, {"label": ids}).output
    output = model(z, t, {"label": ids}, given={"label": shown}).output
    close(output[0], model(z, t, {}).output[0])
    close(output[1], everything[1])
    assert not torch.allclose(output[0], everything[0])


def plain_unet(model: nn.Module) -> nn.Module:
    """ADM's U-Net with the ADM part of the weights."""
    options = {"channel_mult": "1,1", "learn_sigma": True, "attention_resolutions": "4", "num_heads": 4}
    unet = create_model(8, 32, 1, use_scale_shift_norm=True, **options)
    state = {name: x for name, x in model.state_dict().items() if not checkpoint.is_own(name)}
    unet.load_state_dict(state)
    return unet


@pytest.mark.parametrize("variant", VARIANTS)
def test_pure_samples_are_seen_as_adm_sees_them(variant):
    """Bit for bit where all are, to rounding where only some of a batch are."""
    config, model, _ = trained("--mt_task", "masked,label,representation", "--mt_variant", variant)
    z, t, data = inputs(config)
    data = data if variant != "U" else {}
    unet = plain_unet(model)
    reference = unet(z, t)
    assert torch.equal(model(z, t, data, unconditional=True).output, reference)
    some = torch.tensor([True, False, True])
    output = model(z, t, data, unconditional=some).output
    close(output[some], reference[some])
    close(output[~some], model(z, t, data).output[~some])
    assert not torch.allclose(output[1], reference[1])


def test_form_any_is_x_where_given_and_u_where_not():
    """With the indicators' weights at zero: given everything it is form X, given nothing form U, and a batch may mix."""
    tasks = ["--mt_task", "masked,label", "--mt_variant"]
    config, any_, _ = trained(*tasks, "any")
    (_, x_form), (_, u_form) = tiny(*tasks, "X"), tiny(*tasks, "U")
    with torch.no_grad():
        any_.condition_in.weight[:, 3:] = 0.0
    state = any_.state_dict()
    state["condition_in.weight"] = state["condition_in.weight"][:, :3]
    for other in (x_form, u_form):
        names = other.state_dict().keys()
        other.load_state_dict({name: x for name, x in state.items() if name in names})
    z, t, data = inputs(config)
    as_x, as_u = x_form(z, t, data), u_form(z, t)
    everything, nothing = any_(z, t, data), any_(z, t, {})
    close(everything.output, as_x.output, 1e-6)
    close(nothing.output, as_u.output, 1e-6)
    close(everything.predictions["label"], as_x.predictions["label"], 1e-6)
    shown = torch.tensor([True, False, True])
    mixed = any_(z, t, data, given=dict.fromkeys(data, shown)).output
    close(mixed, torch.where(shown.view(-1, 1, 1, 1), as_x.output, as_u.output), 1e-6)
    only_label = any_(z, t, data, given={"label": shown, "masked": ~shown}).output
    close(only_label[shown], any_(z, t, {"label": data["label"]}).output[shown], 1e-6)
    close(only_label[~shown], any_(z, t, {"masked": data["masked"]}).output[~shown], 1e-6)


def test_form_any_tells_an_empty_image_from_none():
    """A masked image that is all grey is zero, as an absent one is: the indicator says which."""
    _, model, _ = trained("--mt_task", "masked", "--mt_variant", "any")
    z, t = torch.randn(1, 3, 8, 8), torch.tensor([100])
    assert not torch.allclose(model(z, t, {"masked": torch.zeros_like(z)}).output, model(z, t, {}).output)


# ---------------------------------------------------------------- the objective


class Recorder(nn.Module):
    """Remembers its inputs; its predictions are constants that can be learned."""

    def __init__(self):
        super().__init__()
        self.weight, self.logits = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))

    def forward(self, z_t, t, modalities, given=None, unconditional=None):
        self.z_t, self.data, self.given, self.unconditional = z_t, modalities, given, unconditional
        logits = self.logits.expand(len(z_t), -1)
        return ModelOutput(self.weight * z_t, {"image": self.weight * z_t, "label": logits})


class Negative(ImageModality):
    def from_batch(self, images, streams):
        return -images.x_start


def recorded(count: int = 16, weights: str = "paper", label_weights: str = "bridge", **options):
    """(losses, what the network saw, process, y_t, t, encodings) with an image and a label as modalities."""
    rng = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, count, 3, 2, 2, generator=rng)
    t = torch.arange(count) * 997 % 1000
    labels = torch.arange(count) % 3
    names = {"image": weights, "label": label_weights}
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", mt_weights=names)
    label = LabelModality(3)
    table = torch.randn(3, 3, 2, 2, generator=rng)
    label.encoder = lambda ids: table[ids]
    model, modalities = Recorder(), {"image": Negative("image"), "label": label}
    images, streams = Images(x_start, labels), SampleStreams(torch.arange(count))
    losses = multi_task_losses(model, diffusion, modalities, images, t, noise, streams, **options)
    return (
        losses,
        model,
        diffusion,
        diffusion.q_sample(x_start, t, noise),
        t,
        {"image": -x_start, "label": table[labels]},
    )


def test_form_any_shows_or_frames_each_modality_of_each_sample():
    """A given modality leaves the frame of its sample, another stays in it; both kinds occur, in every combination."""
    losses, model, diffusion, y_t, t, encodings = recorded(count=64, variant="any")
    frame = torch.zeros_like(y_t)
    for name, encoding in encodings.items():
        outside = model.given[name].view(-1, 1, 1, 1)
        frame = frame + torch.where(outside, 0.0, diffusion.aggregation.shift({name: encoding}, t))
    close(model.z_t, y_t + frame)
    assert set(model.data) == {"image", "label"} and all(taught.all() for taught in losses.taught.values())
    combinations = 2 * model.given["image"].long() + model.given["label"].long()
    assert combinations.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("given_prob", [0.0, 0.3, 1.0])
def test_given_prob_is_how_often_a_modality_is_given(given_prob):
    """Independently of each other; samples trained as unconditional generation are given nothing."""
    losses, model, *_ = recorded(count=4000, variant="any", given_prob=given_prob, drop_prob=0.25)
    kept = losses.taught["label"].bool()
    given = {name: shown[kept].double() for name, shown in model.given.items()}
    spread = 4 * math.sqrt(given_prob * (1 - given_prob) / int(kept.sum()))
    for shown in given.values():
        assert abs(float(shown.mean()) - given_prob) <= spread
    both = float((given["image"] * given["label"]).mean())
    assert abs(both - given_prob**2) <= 4 * math.sqrt(given_prob**2 * (1 - given_prob**2) / int(kept.sum()))
    assert not any(shown[~kept].any() for shown in model.given.values())
    assert torch.equal(model.unconditional, ~kept) and abs(float(kept.double().mean()) - 0.75) < 4 * math.sqrt(
        0.19 / 4000
    )


def test_given_prob_0_and_1_are_forms_u_and_x():
    of_u, u_form, *_ = recorded(variant="U")
    of_x, x_form, *_ = recorded(variant="X")
    for prob, losses, model in ((0.0, of_u, u_form), (1.0, of_x, x_form)):
        ours, seen, *_ = recorded(variant="any", given_prob=prob)
        assert torch.equal(ours.loss, losses.loss) and torch.equal(seen.z_t, model.z_t)


def test_each_modality_has_its_loss_weight_and_its_aggregation_weights():
    losses, model, diffusion, y_t, t, encodings = recorded(loss_weight={"image": 0.1, "label": 0.05})
    expected = losses.denoising + 0.1 * losses.terms["image"] + 0.05 * losses.terms["label"]
    torch.testing.assert_close(losses.loss, expected)
    close(model.z_t, y_t + diffusion.aggregation.shift(encodings, t))
    sizes = {name: e.square().mean((1, 2, 3)).sqrt() for name, e in encodings.items()}
    torch.testing.assert_close(losses.encoding_rms, sizes)
    _, model, diffusion, y_t, t, encodings = recorded(label_weights="none")
    close(model.z_t, y_t + diffusion.aggregation.shift({"image": encodings["image"]}, t))
    dropped, *_ = recorded(loss_weight={"image": 0.1, "label": 0.05}, drop_prob=1.0)
    assert torch.equal(dropped.loss, dropped.denoising)


# ---------------------------------------------------------------- no modality left: ADM

TASKS_AS_ADM = ["label", "masked,label"]


def adm_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x for name, x in model.state_dict().items() if not checkpoint.is_own(name)}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", ["label", "masked", "masked,label", "masked,label,representation"])
def test_twins_start_from_the_same_weights(task, variant):
    """With one seed the ADM part of the network starts alike with any modalities, in any form, and with none."""
    _, plain = tiny()
    _, model = tiny("--mt_task", task, "--mt_variant", variant)
    ours = adm_weights(model)
    assert ours.keys() == plain.state_dict().keys()
    assert all(torch.equal(ours[name], x) for name, x in plain.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", TASKS_AS_ADM)
@pytest.mark.parametrize("head", [[], E_HEAD], ids=["M", "E"])
def test_dropping_every_modality_is_adm(task, variant, head):
    """With mt_drop_prob 1 the losses are plain ADM's, and after steps of the optimiser the weights still are, bit for bit."""
    config, model = tiny("--mt_task", task, "--mt_variant", variant, "--mt_drop_prob", "1", *head)
    with torch.no_grad():  # ADM's zero layers would let nothing through
        model.out[-1].weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    unet, diffusion, modalities = plain_unet(model), build_diffusion(config), build_modalities(config, model)
    model.train(), unet.train()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, unet)]
    rng = torch.Generator().manual_seed(1)
    for step in range(3):
        x_start, noise = torch.randn(2, 4, 3, 8, 8, generator=rng)
        t = torch.randint(0, 1000, (4,), generator=rng)
        images, streams = Images(x_start, torch.arange(4)), SampleStreams(step, torch.arange(4))
        options = {"variant": variant, "drop_prob": config.mt_drop_prob}
        losses = multi_task_losses(model, diffusion, modalities, images, t, noise, streams, **options)
        reference = diffusion.training_losses(unet, x_start, t, None, noise)
        for name in ("mse", "vb"):
            assert torch.equal(losses.terms[name], reference[name])
        assert torch.equal(losses.loss, reference["loss"])
        for optimizer, loss in zip(optimizers, (losses.loss, reference["loss"]), strict=True):
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
    ours = adm_weights(model)
    assert all(torch.equal(ours[name], x) for name, x in unet.state_dict().items())


# ---------------------------------------------------------------- where gradients go


def reached(model: nn.Module) -> set[str]:
    """Names of the parameters with a gradient other than zero."""
    return {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def part(names: set[str], *prefixes: str) -> set[str]:
    return {name for name in names if name.startswith(prefixes)}


ENCODER, DECODER, OUTPUT = ("time_embed.", "input_blocks.", "middle_block."), ("output_blocks.",), ("out.",)
# task: (flags, the parts that its head's loss reaches, the parts that it must not)
REACH = {
    "label": ([], ENCODER, (*DECODER, *OUTPUT)),
    "label E": (E_HEAD, (*ENCODER, *DECODER, *OUTPUT), ()),
    "representation": ([], ENCODER, (*DECODER, *OUTPUT)),
    "masked": ([], (*ENCODER, *DECODER), OUTPUT),
}


@pytest.mark.parametrize("row", REACH)
@pytest.mark.parametrize("variant", ["U", "X"])
def test_each_heads_loss_reaches_its_head_and_its_part_of_the_network(row, variant):
    """Never another head, and in form U never the tokens' embeddings, which nothing reads but the encoder pass."""
    flags, reaches, spares = REACH[row]
    name = row.split()[0]
    config, model, modalities = trained("--mt_task", "masked,label,representation", "--mt_variant", variant, *flags)
    z, t, data = inputs(config)
    z = 0.1 * z  # the predicted x_start within [-1, 1] somewhere: where it is clipped there is no gradient
    result = model(z, t.clamp(max=500), data if variant != "U" else {})
    modalities[name].loss(result.predictions[name], data[name]).sum().backward()
    found, everything = reached(model), {n for n, _ in model.named_parameters()}
    assert part(found, "heads.") == part(everything, f"heads.{name}.")
    for prefix in reaches:
        assert part(found, prefix), prefix
    trunk = {n for n in part(everything, "input_blocks.", "middle_block.") if n.endswith("weight")}
    assert trunk <= found
    if DECODER[0] in reaches:
        assert {n for n in part(everything, "output_blocks.") if n.endswith("weight")} <= found
    assert not part(found, *spares)
    shown = {f"null_token.{n}" for n in ("label", "representation")} if variant == "U" else set()
    assert part(found, "null_token.") == shown
    context = part(everything, "context_in.") if variant == "X" else set()
    assert part(found, "context_in.") == context
    if variant == "U":
        assert not any(p.requires_grad for p in model.context_in.parameters())


@pytest.mark.parametrize("head", [[], E_HEAD], ids=["M", "E"])
def test_the_encoder_pass_adds_no_gradient(head):
    """e_i = stop_gradient(E_i(x_i)): the gradients are those of a run whose encodings are constants of the same values."""
    config, model, modalities = trained("--mt_task", "label", "--mt_variant", "U", *head)
    diffusion = build_diffusion(config)
    x_start, t, _ = inputs(config)
    constants = modalities["label"].encode(torch.arange(CLASSES))
    fixed = LabelModality(CLASSES)
    fixed.encoder = lambda ids: constants[ids]
    gradients = []
    for label in (modalities["label"], fixed):
        images, streams = Images(x_start, torch.arange(3)), SampleStreams(torch.arange(3))
        losses = multi_task_losses(model, diffusion, {"label": label}, images, t, 0.5 * x_start, streams)
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(losses.loss.sum(), names.values(), materialize_grads=True)
        gradients.append(dict(zip(names, found, strict=True)))
        assert float(losses.encoding_rms["label"].min()) > 0
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("predict_xstart", [False, True])
@pytest.mark.parametrize("rescale_timesteps", [False, True])
@pytest.mark.parametrize("steps, respacing", [(1000, ""), (40, ""), (1000, "20")])
def test_what_head_e_classifies(steps, respacing, rescale_timesteps, predict_xstart):
    """The predicted x_start, clipped, at the timestep that the network is told, whichever timesteps are kept."""
    options = {"steps": steps, "noise_schedule": "cosine", "learn_sigma": True}
    options |= {"predict_xstart": predict_xstart, "rescale_timesteps": rescale_timesteps}
    seen = []
    head = ClassifierHead(lambda x, t: seen.append((x, t)) or x, create_gaussian_diffusion(**options))
    visited = create_gaussian_diffusion(**options, timestep_respacing=respacing)
    count = visited.num_timesteps
    rng = torch.Generator().manual_seed(0)
    z_t, t = torch.randn(count, 3, 2, 2, generator=rng), torch.arange(count)
    output, told = torch.randn(count, 6, 2, 2, generator=rng), visited.model_timesteps(t)
    head(HeadInputs(z_t, z_t, z_t, told, output))
    (x, timesteps) = seen.pop()
    # Kept timesteps have their abar up to the rounding of betas; near T eps errors are multiplied by 2e4.
    torch.testing.assert_close(x, visited.predict_xstart(output, z_t, t).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(timesteps, told)


def test_head_e_is_trained_through_what_it_classifies():
    """The gradient reaches the network's output by the predicted x_start, and is zero where that is clipped."""
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    head = ClassifierHead(lambda x, t: 3.0 * x, diffusion)
    t = torch.tensor([500, 500])
    z_t = torch.tensor([0.1, 50.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    output = torch.zeros(2, 3, 2, 2, requires_grad=True)
    head(HeadInputs(z_t, z_t, z_t, t, output)).sum().backward()
    expected = torch.tensor([-3.0 * diffusion.sqrt_recipm1_alphas_cumprod[500], 0.0]).view(2, 1, 1, 1)
    close(output.grad, expected.float().expand_as(output))


# ---------------------------------------------------------------- transfer between tasks


def test_conflict_of_two_small_losses():
    """Norms and cosine against gradients by hand: of 3 a + 4 b and of a b at (a, b) = (2, 1), which are (3, 4) and (1, 2)."""
    a, b = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(1.0))
    objectives = {"one": 3 * a + 4 * b, "two": a * b, "again": 2 * (3 * a + 4 * b), "against": -a * b}
    objectives["elsewhere"] = nn.Parameter(torch.tensor(1.0)) ** 2
    a.grad = torch.tensor(0.25)
    found = task_conflict(objectives, [a, b], Processes())
    assert list(found) == conflict_names(list(objectives))
    cosine = (3 * 1 + 4 * 2) / (5 * math.sqrt(5))
    close(found["grad_norm_one"], torch.tensor(5.0))
    close(found["grad_norm_two"], torch.tensor(math.sqrt(5.0)))
    close(found["grad_cos_one_two"], torch.tensor(cosine))
    close(found["grad_cos_one_again"], torch.tensor(1.0))
    close(found["grad_cos_two_against"], torch.tensor(-1.0))
    assert found["grad_norm_elsewhere"] == 0 and found["grad_cos_one_elsewhere"] == 0
    assert a.grad == 0.25 and b.grad is None
    objectives["two"].backward()  # the graph is still there
    assert b.grad == 2.0


def test_conflict_on_the_shared_network():
    """Of a real model: the parts' gradients add up to the whole's, equal objectives agree, and no .grad is touched."""
    config, model, modalities = trained("--mt_task", "masked,label", "--mt_variant", "U")
    x_start, t, _ = inputs(config)
    images, streams = Images(x_start, torch.arange(3)), SampleStreams(torch.arange(3))
    losses = multi_task_losses(model, build_diffusion(config), modalities, images, t, x_start.flip(0), streams)
    shared = [p for name, p in model.named_parameters() if not checkpoint.is_own(name)]
    objectives = {"denoising": losses.denoising.mean()}
    objectives |= {name: (0.1 * losses.taught[name] * losses.terms[name]).mean() for name in modalities}
    objectives |= {"whole": losses.loss.mean(), "copy": losses.loss.mean()}
    found = {key: float(x) for key, x in task_conflict(objectives, shared, Processes()).items()}
    assert found["grad_cos_whole_copy"] == pytest.approx(1, abs=1e-4)
    names, squared = ["denoising", *modalities], 0.0
    for i, one in enumerate(names):
        squared += found[f"grad_norm_{one}"] ** 2
        for other in names[i + 1 :]:
            product = found[f"grad_norm_{one}"] * found[f"grad_norm_{other}"]
            squared += 2 * product * found[f"grad_cos_{one}_{other}"]
    assert found["grad_norm_whole"] ** 2 == pytest.approx(squared, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())
    losses.loss.mean().backward()
