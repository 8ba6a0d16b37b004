"""The rows of against_parents.py: the parents' own code beside ours.

table       a row, and how a comparison that fails to run becomes one
standins    small modules in the place of what the parents import and a machine may lack
inputs      the same networks, images and noise for both sides
adm         guided-diffusion
training    guided-diffusion's training loop
ldm         latent-diffusion
speed       times, of --speed
goldens     the parents' numbers that tests/golden keeps
"""
