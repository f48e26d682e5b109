"""A hospital's own task, all of it: a folder of PNG or JPEG images, and a torch model. Every hospital has the same file."""

from torch import nn

from fednats import Examples, Task
from fednats.data.images import Images
from fednats.data.table import Classes

# Images lie in folders named as these values; or a labels.csv (file,label and, if known, patient) says what is what.
# size is rows and columns; resize=True shrinks or enlarges images of other sizes; channels=3 keeps colours.
IMAGES = Images(Classes("label", {"benign": 0, "malignant": 1}), size=(64, 64), channels=1)


class MyTask(Task):
    """Benign or malignant, from an image."""

    def __init__(self, folder: str = "") -> None:
        self.folder = folder

    def model(self) -> nn.Module:
        """A small CNN; any torch model may stand here, if its shape does not depend on your data."""
        return nn.Sequential(
            *(nn.Conv2d(IMAGES.channels, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(4, 64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, IMAGES.label.n_classes)),
        )

    def train_data(self) -> Examples:
        """Four patients in five, the same ones in every run; images, where no labels.csv says whose they are."""
        train, _ = IMAGES.read(self.folder).split()
        return train

    def test_data(self) -> Examples:
        """The others."""
        _, test = IMAGES.read(self.folder).split()
        return test
