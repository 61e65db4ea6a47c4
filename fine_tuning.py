"""A folder of labelled images in; a network fine-tuned to retrieve them better out, as a checkpoint.

    python fine_tuning.py --loss supcon --model simclr --train_dir data/intel_dataset/train \\
        --epochs 100 --batch_size 128 --save_dir checkpoints/intel

Then model_fine_tuned.py runs checkpoints/intel/fine_tuned_model.pth. Edit the settings below, or give them as
flags.
"""

from retrieval.console import run_script  # first: it checks the packages, and lets Ctrl-C end the imports

# isort: split
import time
from pathlib import Path

from retrieval.backbones.zoo import ModelType
from retrieval.distributed import set_up
from retrieval.settings import FaceSettings, Folder, NewFolder, PositiveInt
from retrieval.tracking import check_tracker
from supcon.settings import LossSettings, OptimizerSettings, TrainingSettings
from supcon.variants import Loss, choices_of


class Settings(TrainingSettings, OptimizerSettings, LossSettings, FaceSettings):
    """Fine-tune a network on a folder with a folder a class, and keep what retrieves best."""

    loss: Loss = "ce"
    model: ModelType = "efficientnet_lite0"  # python -m retrieval.backbones lists all
    train_dir: Folder = Path("data/train")
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 48
    save_dir: NewFolder = Path("checkpoints")
    resume: bool = False  # True: continue the training in save_dir
    overwrite: bool = False  # True: move the training in save_dir to save_dir/earlier


def main(settings: Settings) -> None:
    started = time.perf_counter()
    set_up()
    check_tracker(settings.tracker)
    from supcon.batches import find_and_split
    from supcon.checkpoints import open_folder
    from supcon.start import load_start
    from supcon.state import begin
    from supcon.training import choose, fit

    choices = choices_of(settings)  # the settings of the loss: its defaults, unless set above
    split = find_and_split(settings)
    with open_folder(settings, split) as saved:  # saved: the state that --resume continues from
        start = load_start(settings, split.train)
        training = begin(settings, choices, split, start, saved, started)
        with training.tracking:
            fit(training)
            choose(training)


if __name__ == "__main__":
    run_script(main, Settings)
