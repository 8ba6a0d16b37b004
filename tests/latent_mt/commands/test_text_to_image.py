"""Text to image: the latents of diffusers' own pipeline, the command, and what is said of bad prompts and sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny_latent import model_params
from tiny_text import tiny_config, tiny_model, write_checkpoint

from guided_mt.diffusion.random import SampleStreams
from guided_mt.diffusion.schedules import half_log_snr
from guided_mt.errors import UserError
from guided_mt.runs.config import parse
from latent_mt.commands import export_diffusers, latent_sample
from latent_mt.commands.loading import load_model, read_saved
from latent_mt.model.conditions import TextConfig, check_prompts, latent_size, read_prompts, text_condition
from latent_mt.model.generate import LatentGenerator, LatentSampleConfig
from latent_mt.runs.targets import instantiate

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
TEXTS, NEGATIVE, SCALE = ["a photo of a small cat", "two red cars"], "blurry, grey", 7.5
SEEDS = [3, 11]


def words(**flags) -> list[str]:
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def complaint(function, *arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **keywords)
    text = str(caught.value)
    assert "\n" not in text and 15 < len(text) < 500, text
    return text


@pytest.fixture(scope="module", params=["v1-inference", "v2-inference-v"])
def published(request, tmp_path_factory):
    """(the model in float32, its .ckpt, its YAML file, the folder in diffusers' layout)."""
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_config(request.param)
    model = tiny_model(config)
    model.network.precision = "fp32"
    weights, file = write_checkpoint(folder, config, model)
    export_diffusers.main(words(model_path=weights, config=file, out=folder / "hf"))
    return model, weights, file, folder / "hf"


def settings(**options) -> LatentSampleConfig:
    return LatentSampleConfig(guidance_scale=SCALE, **options)


def drawn(model, options: LatentSampleConfig, size=None, **keywords) -> torch.Tensor:
    condition = text_condition(model, TEXTS, NEGATIVE, guided=True)
    return LatentGenerator(model, condition, size=size).draw(SEEDS, options, **keywords).x_start


def falling_steps(model) -> list[int]:
    """Timesteps, from the last one down, whose steps in log SNR don't grow: there our second-order rule is the published one."""
    lambdas = half_log_snr(model.diffusion.alphas_cumprod)
    kept, longest = [len(lambdas) - 1], 0.35
    while kept[-1] > 0:
        reached = [t for t in range(kept[-1]) if lambdas[t] - lambdas[kept[-1]] <= longest]
        if not reached:
            break
        longest = lambdas[reached[0]] - lambdas[kept[-1]]
        kept.append(reached[0])
    assert 10 < len(kept) < 60
    return kept


@torch.no_grad()
def test_ddim_is_that_of_their_whole_pipeline(published):
    """The exported folder in StableDiffusionPipeline, text, negative text and all, on an image that is not square."""
    from diffusers import StableDiffusionPipeline

    model, _, _, folder = published
    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": SCALE, "num_inference_steps": 10, "height": 16, "width": 24, "output_type": "latent"}
    z = SampleStreams(torch.tensor(SEEDS)).normal(4, 8, 12)
    theirs = pipeline(prompt=TEXTS, negative_prompt=[NEGATIVE] * 2, latents=z, **options).images
    process = model.respaced("ldm10", "ddim")
    ours = drawn(model, settings(sampler="ddim"), size=(8, 12), process=process)
    assert ours.shape == theirs.shape and ours.std() > 0.3
    assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max().clamp(min=1)
    without = LatentGenerator(model, text_condition(model, TEXTS, "", True), size=(8, 12))
    assert (without.draw(SEEDS, settings(sampler="ddim"), process=process).x_start - ours).abs().max() > 0.05


@torch.no_grad()
def test_dpm_solver_is_theirs_on_the_same_timesteps(published):
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    model, _, _, folder = published
    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
    )
    steps = falling_steps(model)
    scheduler.set_timesteps(timesteps=steps)
    context = text_condition(model, TEXTS, NEGATIVE, guided=True)
    both = torch.cat([context["c_unconditional"].expand(2, -1, -1), context["c_crossattn"]])
    z = SampleStreams(torch.tensor(SEEDS)).normal(4, 8, 8)
    for t in scheduler.timesteps:
        plain, told = pipeline.unet(torch.cat([z, z]), t, encoder_hidden_states=both).sample.chunk(2)
        z = scheduler.step(plain + SCALE * (told - plain), t, z).prev_sample
    ours = drawn(model, settings(sampler="dpm++"), process=model.diffusion.respace(sorted(steps)))
    assert ours.std() > 0.3 and (ours - z).abs().max() < 1e-3 * ours.abs().max().clamp(min=1)


def arrays(folder) -> dict[str, np.ndarray]:
    (file,) = folder.glob("*.npz")
    with np.load(file) as content:
        return {name: content[name] for name in content.files}


def test_the_command_draws_what_the_prompts_say(published, tmp_path, capsys):
    _, weights, file, folder = published
    (tmp_path / "prompts.txt").write_text("a small cat\n\ntwo red cars\n")
    own = {"prompt_file": tmp_path / "prompts.txt", "guidance_scale": SCALE, "steps": 3, "device": "cpu"}
    given = {"model_path": weights, "config": file, "height": 16, "width": 32, "fill_batches": False}
    latent_sample.main(words(**given, **own, num_samples=5, out=tmp_path / "five"))
    five = arrays(tmp_path / "five")
    assert five["arr_0"].shape == (5, 16, 32, 3) and five["arr_0"].dtype == np.uint8 and five["arr_0"].std() > 1
    assert five["prompt"].tolist() == ["a small cat", "two red cars", "a small cat", "two red cars", "a small cat"]
    assert (tmp_path / "five" / "samples_5.png").exists()
    # A sample is its prompt's and its seed's, whatever the batch and the other prompts; one per prompt unless told otherwise.
    latent_sample.main(words(**given, **own, batch_size=1, out=tmp_path / "two"))
    two = arrays(tmp_path / "two")["arr_0"].astype(int)
    assert len(two) == 2 and np.abs(two - five["arr_0"][:2]).max() <= 1
    alone = {"guidance_scale": SCALE, "steps": 3, "device": "cpu", "seeds": 3}
    latent_sample.main(
        words(**given | {"model_path": folder, "config": ""}, **alone, prompt="two red cars", out=tmp_path / "hf")
    )
    assert np.abs(arrays(tmp_path / "hf")["arr_0"][0].astype(int) - five["arr_0"][3]).max() <= 1
    assert ("precision fp32 and not fp16" in capsys.readouterr().out) == ("v2" in str(weights))


def test_entries_too_many_and_parts_that_are_missing(published, tmp_path):
    """What a message advises is a way out: ignore_keys of the YAML file hold where that file is drawn from."""
    _, weights, file, _ = published
    content = torch.load(weights, weights_only=True)
    config = OmegaConf.load(file)
    config.model.params.ignore_keys = ["foo", "betas"]
    OmegaConf.save(config, tmp_path / "ignoring.yaml")
    state = content["state_dict"]
    torch.save({"state_dict": {**state, "foo": torch.zeros(3), "betas": 2 * state["betas"]}}, tmp_path / "more.ckpt")

    def load(path, yaml=file):
        return load_model(read_saved(path, str(yaml)), path, torch.device("cpu"))

    assert "first 'foo'; leave them out by ignore_keys: [foo]" in complaint(load, tmp_path / "more.ckpt")
    load(tmp_path / "more.ckpt", tmp_path / "ignoring.yaml")
    for prefix, part in (("first_stage_model.", "first stage"), ("cond_stage_model.", "conditioning stage")):
        torch.save({k: v for k, v in state.items() if not k.startswith(prefix)}, tmp_path / "less.ckpt")
        assert f"less.ckpt: {part}: the file holds nothing of it; take a checkpoint with" in complaint(
            load, tmp_path / "less.ckpt"
        )


@pytest.mark.parametrize("sampler", ["ddpm", "sde-dpm++", "unipc", "heun"])
def test_every_sampler_takes_a_prompt(sampler):
    model = tiny_model(tiny_config(timesteps=50))
    model.network.precision = "fp32"
    z = drawn(model, settings(sampler=sampler, steps=4))
    assert z.shape == (2, 4, 8, 8) and torch.isfinite(z).all()


def test_guidance_of_a_text_is_away_from_the_other_text():
    """Scale 0 draws the negative prompt, 1 the prompt, to rounding."""
    model = tiny_model(tiny_config())
    model.network.precision = "fp32"

    def of(scale, texts, negative, guided=True):
        condition = text_condition(model, texts, negative, guided)
        return LatentGenerator(model, condition).draw(SEEDS, LatentSampleConfig(steps=4, guidance_scale=scale)).x_start

    plain = of(1.0, ["grey"] * 2, "", guided=False)
    torch.testing.assert_close(of(0.0, TEXTS, "grey"), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of(2.0, ["grey"] * 2, "grey"), plain, rtol=1e-4, atol=1e-4)
    assert (of(1.0, TEXTS, "", guided=False) - plain).abs().max() > 0.01


def by_images(**params):
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return instantiate({"target": target, "params": model_params(**params)}, "model")


def test_sizes_that_the_network_cannot_halve_are_named():
    model = tiny_model(tiny_config())
    assert latent_size(model, -1, -1) == (8, 8) and latent_size(model, 24, 40) == (12, 20)
    assert "--height 18: must be a multiple of 4 for this model, such as 16 or 20" in complaint(
        latent_size, model, 18, 16
    )
    assert "--width 3: must be a multiple of 4 for this model, such as 4" in complaint(latent_size, model, -1, 3)
    assert "at the size of its training, 16" in complaint(latent_size, by_images(), 32, -1)


def test_prompts_that_say_nothing_are_named(tmp_path):
    def read(**flags):
        return read_prompts(parse(words(**flags), (LatentSampleConfig, TextConfig), description=""))

    assert read() is None and read(prompt="").texts == ("",) and read(prompt="a cat").of(5) == "a cat"
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "windows.txt").write_bytes("\ufeffa cat\r\n\r\n two\u2028dogs \r\n".encode())
    assert read(prompt_file=tmp_path / "windows.txt").texts == ("a cat", "two\u2028dogs")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "latin.txt: is no text in UTF-8 (unexpected end of data, byte 4)" in complaint(
        read, prompt_file=tmp_path / "latin.txt"
    )
    assert "give one of them" in complaint(read, prompt="a", prompt_file="b")
    assert "goes with --prompt" in complaint(read, negative_prompt="grey")
    assert "no effect with --guidance_scale 1" in complaint(read, prompt="a", negative_prompt="grey")
    assert "can't be read" in complaint(read, prompt_file=tmp_path / "none.txt")
    assert "holds no line" in complaint(read, prompt_file=tmp_path / "empty.txt")
    text, plain = tiny_model(tiny_config()), by_images(mt_sides=[])
    assert "give it by --prompt TEXT" in complaint(check_prompts, text, None)
    assert "not conditioned on text" in complaint(check_prompts, plain, read(prompt="a cat"))
    assert "--class_id" in complaint(check_prompts, text, read(prompt="a cat"), 3)
