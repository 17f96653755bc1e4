"""Lightning: ranks learned with the weights, in a LightningModule and a callback of a few lines.

pip install . lightning
python examples/lightning_callback.py
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import spectrim as st
from spectrim.train import Schedule


class Classifier(L.LightningModule):
    def __init__(self, network: nn.Module, ranks: st.LearnedRanks | None = None) -> None:
        super().__init__()
        self.network, self.ranks = network, ranks

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        return loss if self.ranks is None else loss + self.ranks.penalty()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=2e-3)


class ChooseRanks(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # the ranks anew
        pl_module.ranks.c_step()


def fit(module: L.LightningModule, epochs: int, *callbacks: L.Callback) -> None:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **quiet).fit(module, batches)


torch.manual_seed(0)
data = load_digits()
images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
batches = DataLoader(TensorDataset(images, labels), batch_size=64)
network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
fit(Classifier(network), 4)  # stands for the training that yours has behind it

EPOCHS = 3
sites = st.calibrate(network, st.find(network), batches)
ranks = st.LearnedRanks(network, sites, st.Budget(macs=0.5), schedule=Schedule(start=0.1, factor=3.0, steps=EPOCHS + 1))
fit(Classifier(network, ranks), EPOCHS, ChooseRanks())
small, plan = ranks.finish(batches)
fit(Classifier(small), 1)  # the factored network is an ordinary one
right = (small.eval()(images).argmax(1) == labels).float().mean().item()
print(f"{100 * right:.1f} % at {plan.ratio('macs'):.2f} times fewer MACs")
