#!/usr/bin/env bash
# Every script on tiny data: two steps, save, resume, sample. Fails at the first that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tiny=(--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --attention_resolutions 4 --diffusion_steps 50
      --noise_schedule cosine --learn_sigma True --global_batch_size 4 --save_interval 2 --log_interval 1 --lr 1e-3
      --ema_rate 0.9)
run() { echo "+ python scripts/$*"; python "scripts/$@" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }; }

run prepare_images.py builtin:digits "$work/digits.zip" --size 8 --limit 40
for variant in U X; do
  one=(--mt_task masked --mt_variant $variant --data_dir "$work/digits.zip" --log_dir "$work/$variant" "${tiny[@]}")
  run image_train.py "${one[@]}" --total_steps 2 --sample_interval 2
  run image_train.py "${one[@]}" --total_steps 4
  grep -q '^4,' "$work/$variant/progress.csv"
  run image_sample.py --model_path "$work/$variant" --num_samples 3 --steps 3
  run image_restore.py --model_path "$work/$variant" --data_dir builtin:digits-test --num_samples 3 --steps 3 --mask patches:2
  run image_nll.py --model_path "$work/$variant" --data_dir builtin:digits-test --num_samples 2 --timestep_respacing 5
done
run image_train.py --mt_task none --class_cond True --num_classes 10 --data_dir builtin:digits --log_dir "$work/none" \
  "${tiny[@]}" --total_steps 2
run image_sample.py --model_path "$work/none" --num_samples 2 --steps 3 --class 7
run image_restore.py --model_path "$work/none" --data_dir builtin:digits-test --num_samples 2 --steps 3 --mask half --method sdedit
run image_restore.py --model_path "$work/none" --data_dir builtin:digits-test --num_samples 2 --mask half --method repaint \
  --repaint_resamples 2
classifier=(--image_size 8 --classifier_width 64 --classifier_depth 1 --classifier_attention_resolutions 4 --num_classes 10
            --diffusion_steps 50 --noise_schedule cosine --global_batch_size 4 --save_interval 2 --log_interval 1)
one=(--data_dir builtin:digits --val_data_dir builtin:digits-test --log_dir "$work/classifier" "${classifier[@]}")
run classifier_train.py "${one[@]}" --iterations 2
run classifier_train.py "${one[@]}" --iterations 5
grep -q '^5,' "$work/classifier/progress.csv"
run classifier_sample.py --model_path "$work/none" --classifier_path "$work/classifier" --num_samples 2 --steps 3 --class 7
run image_train.py --mt_task label --mt_variant U --mt_label_head E --data_dir builtin:digits --log_dir "$work/E" \
  "${tiny[@]}" "${classifier[@]}" --total_steps 2
run image_classify.py --model_path "$work/E" --data_dir builtin:digits-test --num_samples 20 --draws 1
run image_classify.py --classifier_path "$work/classifier" --data_dir builtin:digits-test --num_samples 20 --draws 1
run figure6.py --joint "$work/E" --data_dir builtin:digits --val_data_dir builtin:digits-test --out "$work/f6" --iterations 2 \
  --eval_interval 2 --seeds 0 --val_images 20 --global_batch_size 4
run image_train.py --mt_task caption --mt_variant any --caption_template "digit {class}" --data_dir builtin:digits \
  --log_dir "$work/caption" "${tiny[@]}" --total_steps 2
run image_caption.py --model_path "$work/caption" --data_dir builtin:digits-test --num_samples 20 --draws 1
both=(--mt_task masked,label --mt_variant any --mt_drop_prob 0.2 --data_dir builtin:digits --log_dir "$work/both" "${tiny[@]}")
run image_train.py "${both[@]}" --total_steps 2 --mt_conflict_interval 1 --mt_encoder_refresh 2
run image_sample.py --model_path "$work/both" --num_samples 2 --steps 3 --given label=3 --guidance_scale 2
run prepare_images.py builtin:digits "$work/others.zip" --size 8 --limit 30
run image_train.py --mt_task paired --paired_dir "$work/others.zip" --mt_swap_prob 0.5 --data_dir "$work/digits.zip" \
  --log_dir "$work/paired" "${tiny[@]}" --total_steps 2
run image_sample.py --model_path "$work/paired" --num_samples 2 --steps 3 --given image="$work/digits.zip"
run export_adm.py --model_path "$work/X" --out "$work/adm.pt"
run image_train.py --mt_task masked --mt_variant X --resume_checkpoint "$work/adm.pt" --data_dir "$work/digits.zip" \
  --log_dir "$work/from_adm" "${tiny[@]}" --total_steps 2
run demo.py --run "$work/demo" --steps 2 --processes 1
if command -v mpiexec > /dev/null; then
  if [ "$(id -u)" = 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
  echo "+ mpiexec -n 2 python scripts/image_train.py"
  mpiexec -n 2 --oversubscribe python scripts/image_train.py --mt_task masked --data_dir builtin:digits \
    --log_dir "$work/mpi" "${tiny[@]}" --total_steps 2 > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
fi

python - "$work/pairs" << 'END'
import sys
from pathlib import Path
import numpy as np
from PIL import Image
rng = np.random.default_rng(0)
for split, count in (("train", 6), ("val", 2)):
    folder = Path(sys.argv[1]) / split
    folder.mkdir(parents=True)
    for k in range(count):
        day = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(np.concatenate([day, day // 4], axis=1)).save(folder / f"{'ab'[k % 2]}_{k}.png")
END
data=(data.params.path="$work/pairs" data.params.image_size=16 data.params.batch_size=2 run.save_interval=2 run.log_interval=1
      lightning.trainer.accelerator=cpu)
first=model.params.first_stage_config.params
layers=(ch=32 ch_mult=[1,1] norm_groups=8)
latent=("${data[@]}" model.params.image_size=8 model.params.unet_config.params.image_size=8 "${layers[@]/#/$first.ddconfig.}"
        model.params.unet_config.params.model_channels=32 model.params.unet_config.params.channel_mult=[1,1])
configs=latent_mt/configs
run autoencoder_train.py --config $configs/autoencoder_kl_daynight.yaml "${data[@]}" "${layers[@]/#/model.params.ddconfig.}" \
  run.log_dir="$work/autoencoder" run.total_steps=2
run encode_latents.py --config $configs/daynight_mt.yaml --out "$work/latents" --first_stage "$work/autoencoder" "${latent[@]}"
latent+=(data.params.latents="$work/latents")
one=(--config $configs/daynight_mt.yaml "${latent[@]}" $first.ckpt_path="$work/autoencoder" run.log_dir="$work/latent")
run latent_train.py "${one[@]}" run.total_steps=2 run.sample_interval=2
run latent_train.py "${one[@]}" run.total_steps=4
grep -q '^4,' "$work/latent/progress.csv"
run latent_sample.py --model_path "$work/latent" --given day --steps 2
run latent_sample.py --model_path "$work/latent" --num_samples 2 --steps 2
run export_ldm.py --model_path "$work/latent" --out "$work/ldm.ckpt"
several=(--config $configs/daynight_mt.yaml "${latent[@]}" $first.ckpt_path="$work/autoencoder" data.params.latents=null
         'model.params.mt_sides=[day,night,edges]' 'model.params.mt_tasks={label: {num_classes: 2}, masked: {}}'
         'data.params.computed={edges: edges}' data.params.labels=prefix run.log_dir="$work/several")
run latent_train.py "${several[@]}" run.total_steps=2 run.sample_interval=2
run latent_train.py "${several[@]}" run.total_steps=4
run latent_sample.py --model_path "$work/several" --given edges,label=1 --target night --steps 2
run subsets.py --model_path "$work/several" --num_samples 2 --steps 2
run latent_restore.py --model_path "$work/several" --data_dir "$work/pairs/val" --num_samples 2 --steps 2 --mask half
run latent_classify.py --model_path "$work/several" --data_dir "$work/pairs/val" --draws 1
# which also translates the other way
run table4.py --preset daynight --autoencoder "$work/autoencoder" --latents "$work/latents" --run "$work/table4" --seeds 0 \
  --sample_steps 2 run.total_steps=2 "${latent[@]}"
python - "$work/captions" << 'END'
import sys
from pathlib import Path
import numpy as np
from PIL import Image
folder, rows, rng = Path(sys.argv[1]), ["file,caption"], np.random.default_rng(0)
for split, count in (("train", 16), ("test", 3)):
    (folder / split).mkdir(parents=True)
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / split / f"{k}.png")
        rows.append(f"{split}/{k}.png,picture number {k}")
(folder / "captions.csv").write_text("\n".join(rows))
END
run joint_clip.py --data_dir "$work/captions" --out "$work/joint" --seeds 0 --steps 1 --first_steps 1 --clip_steps 1 --draws 1
run transfer.py --data_dir "$work/captions/train" --val_data_dir "$work/captions/test" --out "$work/transfer" --seeds 0 --steps 1 \
  --tasks masked,caption,random-caption --rows alone,all,uncertainty,routing --samples 0 --mt_variant any --mt_drop_prob 0.2 \
  --image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,1 --attention_resolutions 4 --diffusion_steps 50 \
  --global_batch_size 4 --ema_rate 0.9 --device cpu
run export_diffusers.py --model_path "$work/joint/image_alone_0" --out "$work/pipeline"

score() { echo "+ python evaluations/$*"; python "evaluations/$@" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }; }
export MT_DIFFUSION_CACHE=$work/cache
python - "$work" << 'END'
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, "tests/support")
from inception_graph import write_graph
work, rng = Path(sys.argv[1]), np.random.default_rng(0)
write_graph(work / "graph.pb")
maps = rng.integers(0, 19, (2, 8, 8), dtype=np.uint8)
np.savez(work / "maps.npz", arr_0=maps)
for step in (1, 2):
    np.savez(work / f"step_{step}.npz", probabilities=rng.dirichlet(np.ones(10), 20), labels=rng.integers(0, 10, 20))
END
score make_reference.py "$work/demo/label/samples/samples_2.npz" "$work/reference.npz" --inception "$work/graph.pb" --images 8
score evaluator.py "$work/reference.npz" "$work/X/samples/samples_3x8x8x3.npz" --inception "$work/graph.pb" --metrics is,fid --json "$work/s.json"
grep -q '"fid"' "$work/s.json"
score restoration.py "$work/X/samples/restored_mt_patches2.npz" --metrics psnr,ssim,mse,mae
score segmentation.py "$work/maps.npz" "$work/maps.npz" --out_dir "$work/maps"
score classification.py "$work/step_1.npz" "$work/step_2.npz" --csv "$work/figure6.csv" --plot "$work/figure6.png"

echo "+ python benchmarks/gpu.py --device cpu"
python benchmarks/gpu.py --device cpu --out "$work/gpu" --stages right,waiting,learns --minutes 4 \
  --only words,"form any",optimiser,dpm++,"step: any",classifier,"twin: any" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
grep -q '"measured"' "$work/gpu/gpu.json"
echo "smoke: every script ran"
