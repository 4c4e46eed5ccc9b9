"""The configuration of a run: frozen dataclasses; fields have the names of the flags. Imports neither torch nor the rest of this package.

The metadata of a field hold its help for the command line and the values that `validate` allows. Sequences stay strings
("32,16,8"), as they are typed and stored; properties give them as numbers.
"""

from .fields import SWITCH as SWITCH
from .fields import Section as Section
from .fields import flag as flag
from .fields import flatten as flatten
from .fields import numbers as numbers
from .networks import NETWORKS as NETWORKS
from .networks import UNET as UNET
from .networks import ClassifierConfig as ClassifierConfig
from .networks import ModelConfig as ModelConfig
from .networks import Network as Network
from .networks import SuperResConfig as SuperResConfig
from .networks import classes_of as classes_of
from .networks import label_rows as label_rows
from .runs import WEIGHTS as WEIGHTS
from .runs import WEIGHTS_HELP as WEIGHTS_HELP
from .runs import ClassifierTrainConfig as ClassifierTrainConfig
from .runs import DataConfig as DataConfig
from .runs import DiffusionConfig as DiffusionConfig
from .runs import RunConfig as RunConfig
from .runs import TrainConfig as TrainConfig
from .runs import changed as changed
from .runs import laid_over as laid_over
from .runs import relative_lengths as relative_lengths
from .sampling import LikelihoodConfig as LikelihoodConfig
from .sampling import SampleConfig as SampleConfig
from .sweeps import SweepConfig as SweepConfig
from .sweeps import each_setting as each_setting
