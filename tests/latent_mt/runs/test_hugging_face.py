"""diffusers' layout, in and out: its own classes load what we write, and we what they write, with equal outputs."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_stable_diffusion import complaint
from tiny_text import PUBLISHED, tiny_config, tiny_model, write_checkpoint

from guided_mt.errors import UserError
from guided_mt.networks.clip import tokenize
from guided_mt.runs.checkpoint import find_weights
from guided_mt.runs.weights import find_state
from latent_mt.commands import export_diffusers, export_ldm
from latent_mt.commands.loading import load_model, read_saved
from latent_mt.conditioners.clip import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder
from latent_mt.runs.hugging_face import configuration, read_state, text_encoder, unet, vae
from latent_mt.runs.ldm_checkpoint import read_ldm
from mt_diffusion.show.recognised import describe

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
NAMES = ["v1-inference", "v2-inference-v"]
CPU = torch.device("cpu")


def words(**flags) -> list[str]:
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def parts(folder):
    """What diffusers and transformers make of a folder, and that each class found all its entries and no other."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    unet, about = UNet2DConditionModel.from_pretrained(
        folder / "unet", output_loading_info=True, low_cpu_mem_usage=False
    )
    assert not any(about.values()), about
    vae, about = AutoencoderKL.from_pretrained(folder / "vae", output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(about.values()), about
    text, about = CLIPTextModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"], about
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    return unet.eval(), vae.eval(), text.eval(), scheduler, CLIPTokenizer.from_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module", params=NAMES)
def exported(request, tmp_path_factory):
    """(the model, its .ckpt, the folder that the command made of it)."""
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny_config(request.param)
    model = tiny_model(config)
    weights, file = write_checkpoint(folder, config, model)
    export_diffusers.main(words(model_path=weights, config=file, out=folder / "hf"))
    return model, weights, folder / "hf"


@torch.no_grad()
def assert_equal_outputs(model, unet, vae, text, scheduler):
    torch.manual_seed(1)
    z, t, images = torch.randn(2, 4, 8, 8), torch.tensor([3, 801]), torch.rand(2, 3, 16, 16) * 2 - 1
    texts = ["a photo of a small cat", "two red cars"]
    stage = model.cond_stage_model
    context = stage(texts)
    theirs = text(input_ids=tokenize(texts, stage.padding)[0]).last_hidden_state
    torch.testing.assert_close(theirs, context, rtol=1e-5, atol=1e-5)
    model.network.precision = "fp32"
    ours = model.model(z, t, {}, c_crossattn=context).output
    assert ours.std() > 0.1
    torch.testing.assert_close(unet(z, t, encoder_hidden_states=context).sample, ours, rtol=1e-4, atol=1e-4)
    mean, logvar = model.first_stage_model.encode_moments(images)
    drawn = vae.encode(images).latent_dist
    torch.testing.assert_close(drawn.mean, mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn.logvar, logvar, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.decode(z).sample, model.first_stage_model.decode(z), rtol=1e-4, atol=1e-4)
    assert vae.config.scaling_factor == pytest.approx(float(model.scale_factor))
    betas = torch.as_tensor(model.diffusion.betas, dtype=torch.float32)
    torch.testing.assert_close(scheduler.betas, betas, rtol=1e-5, atol=1e-9)
    predictions = {"eps": "epsilon", "v": "v_prediction"}
    assert scheduler.config.prediction_type == predictions[str(model.diffusion.model_mean_type)]


def test_their_classes_load_our_export_strictly(exported):
    model, _, folder = exported
    unet, vae, text, scheduler, tokenizer = parts(folder)
    assert_equal_outputs(model, unet, vae, text, scheduler)
    texts = ["a photo of a small cat", ""]
    ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, tokenize(texts, model.cond_stage_model.padding)[0])
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["unet"] == ["diffusers", "UNet2DConditionModel"]
    if not isinstance(model.cond_stage_model, FrozenCLIPEmbedder):  # the last block is not in the file
        assert text.config.num_hidden_layers == 2
    assert not list(folder.parent.glob(".tmp_*"))


def test_our_own_export_comes_back_to_the_bit(exported):
    model, weights, folder = exported
    path = find_weights(folder)
    loaded = load_model(read_saved(path, ""), path, CPU)
    own = model.state_dict()
    unused = {f"cond_stage_model.{key}" for key in model.cond_stage_model.unused}
    assert own.keys() - loaded.state_dict().keys() == unused
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())
    assert (loaded.diffusion.betas == model.diffusion.betas).all()
    # As latent-diffusion's file again.
    export_ldm.main(words(model_path=folder, out=folder.parent / "again.ckpt"))
    again, first = read_ldm(folder.parent / "again.ckpt"), read_ldm(weights)
    assert again.model.keys() == first.model.keys() and all(
        torch.equal(v, first.model[k]) for k, v in again.model.items()
    )
    assert all(torch.equal(value, first.cond_stage[key]) for key, value in again.cond_stage.items())
    assert again.buffers.keys() == first.buffers.keys()
    described = read_saved(folder.parent / "again.ckpt", str(folder.parent / "again.yaml"))
    assert load_model(described, folder.parent / "again.ckpt", CPU).network.state_dict().keys() == again.model.keys()


@pytest.mark.parametrize("version", [1, 2])
def test_what_they_save_is_loaded(version, tmp_path):
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(version)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=[2, 4] if version == 2 else 8,
        use_linear_projection=version == 2,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(32, 64), latent_channels=4, scaling_factor=0.2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    text = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=49408, hidden_act="gelu" if version == 2 else "quick_gelu"))
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = PNDMScheduler(**schedule, prediction_type="v_prediction" if version == 2 else "epsilon")
    for name, part in {"unet": unet, "vae": vae, "text_encoder": text, "scheduler": scheduler}.items():
        part.save_pretrained(tmp_path / name)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    path = find_weights(tmp_path)
    model = load_model(read_saved(path), path, CPU)
    assert_equal_outputs(model, unet.eval(), vae.eval(), text.eval(), scheduler)
    # Older files: transformers' prefix and position_ids, diffusers' former names of attention, half precision.
    file = tmp_path / "text_encoder" / "model.safetensors"
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    torch.save({key: value.clone() for key, value in state.items()}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    file.unlink()
    older = load_model(read_saved(path), path, CPU)
    assert all(torch.equal(value, older.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_released_folder_has_the_published_shapes():
    """Stable Diffusion 2's own config.json files, as they circulate."""
    config = {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "layers_per_block": 2,
        "sample_size": 96,
        "use_linear_projection": True,
    }
    wanted = PUBLISHED["v2-inference-v"]["model"]["params"]
    found = unet.to_ldm(config, "unet")
    assert sorted(found["attention_resolutions"]) == sorted(wanted["unet_config"]["params"]["attention_resolutions"])
    for key in ("channel_mult", "num_head_channels", "context_dim", "model_channels"):
        assert found[key] == wanted["unet_config"]["params"][key], key
    assert found["use_linear_in_transformer"] and found["image_size"] == 96
    first = vae.to_ldm({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 768}, "vae")
    assert first["ddconfig"] | {"resolution": 256} == wanted["first_stage_config"]["params"]["ddconfig"]
    text = {
        "hidden_size": 1024,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "hidden_act": "gelu",
    }
    assert text_encoder.to_stage(text, "text")["params"] == {
        "arch": "ViT-H-14",
        "version": None,
        "freeze": True,
        "layer": "penultimate",
    }


def test_what_does_not_fit_is_named(exported, tmp_path):
    _, _, folder = exported

    def changed(part: str, **values) -> str:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        file = copy / part
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return complaint(lambda: load_model(read_saved(find_weights(copy)), find_weights(copy), CPU))

    assert "is a StableDiffusionInpaintPipeline" in changed(
        "model_index.json", _class_name="StableDiffusionInpaintPipeline"
    )
    assert "class_embed_type 'projection' is not supported" in changed(
        "unet/config.json", class_embed_type="projection"
    )
    assert "prediction_type 'flow' is none of" in changed("scheduler/scheduler_config.json", prediction_type="flow")
    assert "hidden_act 'relu'" in changed("text_encoder/config.json", hidden_act="relu")
    assert "shift_factor 0.1" in changed("vae/config.json", shift_factor=0.1)
    assert "has no hidden_size" in changed("text_encoder/config.json", hidden_size=None)
    # Weights of another network than config.json describes.
    assert "network: another architecture: it lacks" in changed("unet/config.json", layers_per_block=2)
    one = {
        "block_out_channels": [32],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    }
    said = changed("unet/config.json", **one, attention_head_dim=2)
    assert "is none of the network that its config.json describes" in said
    (tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copy(folder / "unet" / "config.json", tmp_path / "copy" / "unet" / "config.json")
    assert "holds no weights" in complaint(read_state, find_weights(tmp_path / "copy"))
    shutil.rmtree(tmp_path / "copy" / "vae")
    assert "no such file; a pipeline's folder holds" in complaint(configuration, find_weights(tmp_path / "copy"))


OF_ANOTHER_KIND = [
    ("unet", {"block_out_channels": "32"}, r"block_out_channels '32': a list of whole numbers from 1 on"),
    ("unet", {"block_out_channels": []}, r"block_out_channels \[\]: a list of whole numbers"),
    ("unet", {"attention_head_dim": [2]}, r"attention_head_dim \[2\]: as many as block_out_channels are expected, 2"),
    ("unet", {"layers_per_block": [1, 2]}, r"layers_per_block \[1, 2\]: one whole number"),
    ("unet", {"sample_size": [8, 8]}, r"sample_size \[8, 8\]: one whole number"),
    ("unet", {"cross_attention_dim": None}, r"has no cross_attention_dim"),
    ("unet", {"resnet_out_scale_factor": 2.0}, r"resnet_out_scale_factor 2\.0 is not supported, only 1\.0"),
    ("unet", {"timestep_post_act": "silu"}, r"timestep_post_act 'silu' is not supported"),
    ("vae", {"scaling_factor": None}, r"vae.config\.json: has no scaling_factor"),
    ("vae", {"latent_channels": "4"}, r"latent_channels '4': one whole number"),
    ("vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, r"2 DownEncoderBlock2D are expected"),
    ("text_encoder", {"model_type": "t5"}, r"is a t5; Stable Diffusion 1 and 2 read texts by CLIP's text model"),
    ("text_encoder", {"num_attention_heads": 5}, r"hidden_size 32 is no multiple of its num_attention_heads"),
    ("text_encoder", {"num_hidden_layers": True}, r"num_hidden_layers True: one whole number"),
    ("scheduler", {"num_train_timesteps": 0}, r"num_train_timesteps 0: one whole number"),
    ("scheduler", {"beta_start": None}, r"has no beta_start"),
    ("scheduler", {"beta_end": "x"}, r"beta_end 'x': a number above 0"),
    ("scheduler", {"trained_betas": []}, r"trained_betas: a list of numbers between 0 and 1"),
    ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, r"is no scheduler of a diffusion by betas"),
]


def test_values_of_another_kind_are_named(exported, tmp_path):
    _, _, folder = exported
    for part, values, expected in OF_ANOTHER_KIND:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"), dirs_exist_ok=True)
        file = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        assert re.search(expected, complaint(configuration, find_weights(copy))), values


def test_weights_in_several_files_and_of_the_variant_fp16(exported, tmp_path):
    _, _, folder = exported
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    whole, part = read_state(find_weights(folder)), copy / "unet"
    state = load_file(part / "diffusion_pytorch_model.safetensors")
    (part / "diffusion_pytorch_model.safetensors").unlink()
    names = {key: f"diffusion_pytorch_model-0000{1 + k % 2}-of-00002.safetensors" for k, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: value for key, value in state.items() if names[key] == name}, part / name)
    for ending in ("safetensors.index.json", "safetensors.index.fp16.json"):
        index = part / f"diffusion_pytorch_model.{ending}"
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        again = read_state(find_weights(copy))
        assert again.keys() == whole.keys() and all(torch.equal(value, again[key]) for key, value in whole.items())
        for content in ({}, {"weight_map": ["x"]}, {"weight_map": {"x": 3}}):
            index.write_text(json.dumps(content))
            assert "its weight_map doesn't name the file of each entry" in complaint(read_state, find_weights(copy))
        index.unlink()
    index.write_text(json.dumps({"weight_map": names}))
    (part / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    said = complaint(read_state, find_weights(copy))
    assert "-00002-of-00002.safetensors: no such file, which diffusion_pytorch_model" in said
    index.unlink()
    torch.save(state, part / "diffusion_pytorch_model.fp16.bin")
    assert all(torch.equal(value, whole[key]) for key, value in read_state(find_weights(copy)).items())
    (part / "diffusion_pytorch_model.fp16.bin").rename(part / "diffusion_pytorch_model.non_ema.bin")
    assert "but diffusion_pytorch_model-00001-of-00002.safetensors, diffusion_pytorch_model.non_ema.bin" in complaint(
        read_state, find_weights(copy)
    )


def test_a_folder_without_its_index_and_entries_that_are_missing(exported, tmp_path):
    _, _, folder = exported
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "text_encoder" / "model.safetensors"
    state = load_file(file)
    gone = next(key for key in state if key.endswith("k_proj.weight"))
    save_file({key: value for key, value in state.items() if key != gone}, file)
    said = complaint(lambda: load_model(read_saved(find_weights(copy)), find_weights(copy), CPU))
    assert "conditioning stage: another architecture: it lacks 1 of the model's" in said
    (copy / "model_index.json").unlink()
    assert "is a folder of diffusers' without its model_index.json" in complaint(find_weights, copy)


def test_the_activation_is_that_of_the_weights():
    """OpenAI's weights of open_clip have another one than the architecture's name says."""
    for version, wanted in (("openai", "quick_gelu"), ("laion2b_e16", "gelu"), (None, "gelu")):
        with torch.device("meta"):
            stage = FrozenOpenCLIPEmbedder("ViT-B-32", version, layer="penultimate")
        assert text_encoder.to_transformers(stage, text_encoder.OPEN_CLIP)["hidden_act"] == wanted


def test_a_tokenizer_that_fills_texts_up_with_another_token(exported, tmp_path, caplog):
    model, _, folder = exported
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    configuration(find_weights(tmp_path / "copy"))
    assert not caplog.text
    own = "<|endoftext|>" if isinstance(model.cond_stage_model, FrozenCLIPEmbedder) else "!"
    other = {"<|endoftext|>": "!", "!": "<|endoftext|>"}[own]
    for name, token in (("again", {"content": own}), ("other", {"content": other}), ("word", other), ("none", None)):
        shutil.copytree(tmp_path / "copy", tmp_path / name)
        (tmp_path / name / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": token}))
        for _ in range(2):
            configuration(find_weights(tmp_path / name))
    assert caplog.text.count("texts are filled up with token") == 2 and "again" not in caplog.text


def test_show_says_what_a_folder_is(exported):
    _, weights, folder = exported
    facts = describe(str(folder))
    second = "v2" in str(weights)
    assert "text-to-image model" in facts.kind and facts.rows["predicts"] == ("v" if second else "eps")
    assert facts.rows["text encoder"] == ("FrozenOpenCLIPEmbedder" if second else "FrozenCLIPEmbedder")
    assert facts.rows["size in pixels"] == 16 and "--prompt TEXT" in facts.commands[0][1]
    said = complaint(find_state, folder / "model_index.json")
    assert "latent-sample loads its folder" in said


def test_what_has_no_place_there_is_named(tmp_path):
    config = tiny_config()
    weights, file = write_checkpoint(tmp_path, config, tiny_model(config))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    command = {"model_path": weights, "config": file}
    assert "is there already" in complaint(export_diffusers.main, words(**command, out=tmp_path / "full"))
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"
    with pytest.raises(UserError, match="--out is missing"):
        export_diffusers.main(words(**command))
