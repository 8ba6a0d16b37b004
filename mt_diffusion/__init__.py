"""The one console command of the project: `mt-diffusion SUB-COMMAND`, or `python -m mt_diffusion SUB-COMMAND`."""
