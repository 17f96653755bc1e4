"""A model of transformers: compressed, trained on by its Trainer, saved and loaded by its own functions.

pip install '.[hf]'
python examples/trainer.py
"""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import spectrim as st
import spectrim.hf  # lets from_pretrained build the layers

torch.manual_seed(0)
config = BertConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128,
    max_position_embeddings=16, num_labels=4,
)  # fmt: skip
model = BertForSequenceClassification(config)  # yours: from_pretrained("...")
tokens = torch.randint(0, 64, (256, 12))
rows = [{"input_ids": ids, "labels": ids[0] % 4} for ids in tokens]  # the class is the first token modulo 4


def train(network: torch.nn.Module, epochs: int) -> None:
    arguments = TrainingArguments(
        "runs", num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=2e-3, use_cpu=True,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(network, arguments, train_dataset=rows).train()
    network.eval()


def right(network: torch.nn.Module) -> float:
    with torch.no_grad():
        return 100 * (network(input_ids=tokens).logits.argmax(1) == tokens[:, 0] % 4).float().mean().item()


train(model, 5)  # stands for the training that yours has behind it
batches = [{"input_ids": part} for part in tokens.split(64)]
small = st.compress(model, batches, "macs=60%", skip="classifier").model
print(f"{right(model):.1f} % dense, {right(small):.1f} % compressed")

train(small, 1)
small.save_pretrained("small")
again = BertForSequenceClassification.from_pretrained("small").eval()
print(f"{right(again):.1f} % trained on, saved and loaded")
