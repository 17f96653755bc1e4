"""Compressed models of transformers: with this imported, ``from_pretrained`` builds what ``save_pretrained`` wrote.

A model that Spectrim compressed is saved by its own ``save_pretrained``: the plan lies in ``config.json``, the factors
in the safetensors files. transformers loads such a folder once this module has been imported::

    import spectrim.hf

    small = AutoModelForCausalLM.from_pretrained("small")

The place that transformers has for what changes layers before weights are loaded are its quantisers. A loaded model is
none of the quantised ones: it trains, is cast and is saved as any other.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spectrim.nn.shipping import METHOD
from spectrim.nn.unshipping import Unshipping

if not hasattr(HfQuantizer, "update_attn_implementation"):
    from transformers import __version__

    raise ImportError(
        f"spectrim.hf cannot read configurations with transformers {__version__}: pip install -U transformers"
    )


class SpectrimConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed model: its plans, in order.

    Raises
    ------
    spectrim.CheckpointError
        If it is of a version that this library does not read, or its plans are none.
    """

    def __init__(self, **record: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.record = {**record, "quant_method": METHOD}
        self.unshipping = Unshipping.of(record)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.record)


class SpectrimQuantizer(HfQuantizer):
    """Builds the layers of the plans before weights are loaded, and leaves an ordinary model behind."""

    quantization_config: Any

    def update_attn_implementation(self, config: Any) -> Any:
        """Take away what has transformers without Spectrim refuse the folder."""
        config.transformers_weights = None
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._unshipping = self.quantization_config.unshipping.fitting(model)
        self._built = self._unshipping.build(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._unshipping.fill(model, self._built)
        self.remove_quantization_config(model)
        for module in model.modules():
            for name in ("_is_quantized", "transformers_weights"):
                vars(getattr(module, "config", model.config)).pop(name, None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


# Not by the functions that register: they refuse a module that is loaded again.
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = SpectrimConfig
AUTO_QUANTIZER_MAPPING[METHOD] = SpectrimQuantizer
