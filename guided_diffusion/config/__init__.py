"""What a run is: frozen values, spelled as the flags of 2021 where a flag exists. Imports nothing heavy, nothing of ours.

Every field carries its meaning in the metadata, from which the command line makes its help; `validate` refuses
impossible values by name. Sequences stay strings ("32,16,8") as they are typed and stored; the properties give them as
numbers.
"""

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
from .networks import default_multipliers as default_multipliers
from .runs import PRECISIONS as PRECISIONS
from .runs import WEIGHTS as WEIGHTS
from .runs import WEIGHTS_HELP as WEIGHTS_HELP
from .runs import ClassifierTrainConfig as ClassifierTrainConfig
from .runs import DataConfig as DataConfig
from .runs import DiffusionConfig as DiffusionConfig
from .runs import RunConfig as RunConfig
from .runs import SampleConfig as SampleConfig
from .runs import TrainConfig as TrainConfig
from .runs import changed as changed
from .runs import laid_over as laid_over
