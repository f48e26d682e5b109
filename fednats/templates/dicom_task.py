"""A hospital's own task, all of it: a folder of DICOM images, and a torch model. Every hospital has the same file."""

from torch import nn

from fednats import Examples, Task
from fednats.data.dicom_folder import DicomFolder
from fednats.data.table import Classes

# The folder has a labels.csv with the columns file,label; frame where a file has several, patient where PatientID is gone.
# CT is read in Hounsfield units: low and high are what is seen. X-rays: ("CR", "DX"), low=0, high=1, no spacing_mm.
SCANS = DicomFolder(
    Classes("label", {"benign": 0, "malignant": 1}),
    modalities=("CT",),
    size=(256, 256),  # rows and columns of what is cut out of the middle
    low=-1150,
    high=350,
    spacing_mm=1.5,  # of a pixel, after resampling
)


class MyTask(Task):
    """Benign or malignant, from a slice."""

    def __init__(self, folder: str = "") -> None:
        self.folder = folder

    def model(self) -> nn.Module:
        """A small CNN; any torch model may stand here, if its shape does not depend on your data."""
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 5, stride=4, padding=2), nn.GroupNorm(4, 16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(4, 64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, SCANS.label.n_classes)),
        )

    def train_data(self) -> Examples:
        """Four patients in five, the same ones in every run."""
        train, _ = SCANS.read(self.folder).split()
        return train

    def test_data(self) -> Examples:
        """The others."""
        _, test = SCANS.read(self.folder).split()
        return test
