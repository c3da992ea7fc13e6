"""``python -m stable_sam_cuda`` is ``stable-sam``; so is ``torchrun -m stable_sam_cuda`` on several processes."""

from stable_sam_cuda.cli import app

app(prog_name="stable-sam")
