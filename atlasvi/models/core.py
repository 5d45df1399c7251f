"""What a model is made of: registered data, a module of torch, what is known of its training, a folder."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from atlasvi.errors import ModelError, NotTrainedError, OptionError
from atlasvi.models.arguments import at_least_one, cell_positions, checked_seed, refuse
from atlasvi.models.data import Data, LibraryMoments, library_moments, registered, split_cells, with_cells
from atlasvi.models.folder import DESCRIPTION, read_description, read_weights, write_folder
from atlasvi.models.frozen import Freeze
from atlasvi.nn import ranks
from atlasvi.store.atlas import Atlas, as_atlas
from atlasvi.store.fields import UNS_KEY, Codes, register, resolve, uns_entry
from atlasvi.store.identity import look
from atlasvi.stream import Epochs
from atlasvi.train.history import Check, EpochRecord, to_frame, to_frames
from atlasvi.train.schedule import PLANS, TrainingPlan
from atlasvi.types import Encodes, FieldMap, Minibatch

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("atlasvi")

Config = TypeVar("Config")
Module = TypeVar("Module", bound=torch.nn.Module)

INFERENCE_BATCH = 1024


class Model(Generic[Config, Module]):
    """Data, weights, and what is known of both. `base.CountModel` is what models are made from.

    Args:
        adata: the data it will be trained on, set up.
        config: of the subclass.
        needs_library: whether the module wants the library sizes' moments.
    """

    config_type: ClassVar[type]
    module_type: ClassVar[type]
    needs_many_cells: ClassVar[bool] = True
    loss_name: ClassVar[str] = "-ELBO"
    # Whether what `get_elbo` gives is log p(x) itself.
    _bound_is_exact: ClassVar[bool] = False

    atlas: Atlas | None
    fields: FieldMap
    config: Config
    module: Module
    plan: TrainingPlan

    def __init__(self, adata: Data, config: Config, *, needs_library: bool) -> None:
        checked_seed(config.seed)  # type: ignore[attr-defined]
        self.atlas, self.fields = registered(adata, type(self).__name__)
        self.config = config
        self._codes: Codes | None = resolve(self.fields, self.atlas)
        if self.needs_many_cells and self.atlas.n_obs < self.fields.n_vars:
            warnings.warn(
                f"{self.atlas.n_obs:,} cells for {self.fields.n_vars:,} genes: the scVI paper found "
                "underfitting with fewer cells than genes; select genes (gene_mask=) or use PCA",
                UserWarning,
                stacklevel=3,
            )
        moments = library_moments(self.atlas, self._codes, self.fields.n_batch) if needs_library else None
        self._assemble(moments)

    @classmethod
    def without_data(cls, config: Config, fields: FieldMap) -> Any:
        """A model of given sizes with weights yet to be filled in: what `load` begins with."""
        model = cls.__new__(cls)
        model.atlas, model._codes = None, None
        model.config, model.fields = config, fields
        model._assemble(LibraryMoments((0.0,) * fields.n_batch, (1.0,) * fields.n_batch))
        return model

    def _assemble(self, moments: LibraryMoments | None) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)  # type: ignore[attr-defined]
            self.module = self.module_type(self.config, self.fields, moments)
        self.module.eval()
        self.plan = PLANS["adaptive"]
        self._freeze: Freeze | None = None
        self.records: list[EpochRecord] = []
        # What trained it, if that was not `train`.
        self.origin: str | None = None
        self.checks: list[Check] = []
        self._split: dict[str, Any] | None = None
        self._looks_like: str | None = None
        self._training: dict[str, Any] | None = None

    def __repr__(self) -> str:
        state = f"trained {len(self.records)} epochs" if self.records else self.origin or "not trained"
        return f"{type(self).__name__}({self.fields.n_vars:,} genes, {self.fields.n_batch} batches, {state})"

    # --- setting up -------------------------------------------------------------------------------

    @classmethod
    def setup_anndata(
        cls,
        adata: Data,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        size_factor_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        *,
        gene_mask: str | None = "auto",
    ) -> None:
        """Say which columns the model should use. An AnnData gets one JSON entry, ``uns["atlasvi"]``,
        and nothing else; a store on disk is not written to.

        Args:
            adata: an AnnData (in memory, backed or lazy) or an opened `Atlas`.
            layer: where the counts of an AnnData are: ``None`` for ``X``, a layer's name, or ``"raw"``.
            batch_key: column of obs with the batch.
            labels_key: column of obs with labels (for ``dispersion="gene-label"``).
            size_factor_key: column of obs with a size factor > 0.
            categorical_covariate_keys: further columns with levels to remove.
            continuous_covariate_keys: further columns with numbers to remove.
            gene_mask: boolean column of var that chooses the genes; ``"auto"`` takes
                ``"highly_variable"`` where it is there and says so; ``None`` takes all genes.

        Raises:
            ObsError: a column is missing, or has gaps.
            GenesError: duplicate genes, or a mask that is not one.
        """
        if isinstance(adata, str | Path):
            raise OptionError(
                f"setup_anndata was given the path {str(adata)!r}; open it first: atlas = atlasvi.open(path)"
            )
        atlas = adata if isinstance(adata, Atlas) else Atlas.from_anndata(adata, layer=layer)
        if gene_mask == "auto":
            gene_mask = "highly_variable" if "highly_variable" in atlas.var_keys else None
            if gene_mask:
                logger.warning(
                    "setup_anndata: var['highly_variable'] chooses the genes; pass gene_mask=None for all"
                )
        fields = register(
            atlas,
            layer=atlas.layer if isinstance(adata, Atlas) and layer is None else layer,
            batch_key=batch_key,
            labels_key=labels_key,
            size_factor_key=size_factor_key,
            categorical_covariate_keys=categorical_covariate_keys,
            continuous_covariate_keys=continuous_covariate_keys,
            gene_mask=gene_mask,
        )
        if isinstance(adata, Atlas):
            adata.registration = fields
        else:
            adata.uns[UNS_KEY] = uns_entry(fields)

    # --- what is known of training ----------------------------------------------------------------

    @property
    def is_trained(self) -> bool:
        """Whether `train` has come to an end, or the weights came from a model that was trained."""
        return bool(self.records) or self.origin is not None

    @property
    def history(self) -> dict[str, pd.DataFrame]:
        """A data frame by epoch for each quantity; names as in scvi-tools, ``elbo_*`` is negative ELBO."""
        return to_frames(self.records)

    @property
    def validation_history(self) -> pd.DataFrame:
        """A row for each look at the cells kept for validation, by step: seconds and negative ELBO."""
        return to_frame(self.checks)

    @property
    def _kept_look(self) -> Check | None:
        """The look whose weights the model has, where those of the best one were kept."""
        step = (self._training or {}).get("kept_step")
        return None if step is None else next(check for check in self.checks if check.step == step)

    @property
    def train_indices(self) -> NDArray[np.int64]:
        """Positions of the cells trained on."""
        return self._split_part(0)

    @property
    def validation_indices(self) -> NDArray[np.int64]:
        """Positions of the cells kept for validation."""
        return self._split_part(1)

    def was_trained_on(self, adata: Data | None = None) -> bool | None:
        """Whether these are the cells that the model was trained on, in their order.

        By their number, the genes' names, and the counts of a few dozen cells; the rest is not read.

        Args:
            adata: other data; that of the model when ``None``.

        Returns:
            ``None`` where the model does not know: it was not trained here, or saved by an earlier version.

        Example:
            >>> model.was_trained_on(atlas), model.was_trained_on(atlas[10:])
            (True, False)
        """
        if self._looks_like is None:
            return None
        atlas, codes = self._data(adata)
        return look(atlas[:, codes.gene_columns]) == self._looks_like

    def _split_part(self, part: int) -> NDArray[np.int64]:
        if self._split is None:
            raise NotTrainedError("the cells are split when training starts; call train() first")
        return split_cells(**self._split)[part]

    # --- files ------------------------------------------------------------------------------------

    def save(self, dir_path: str | Path, overwrite: bool = False, **unsupported: object) -> None:
        """Write the model as a folder: safetensors for the weights, JSON for the rest, nothing pickled.

        A checkpoint and a log that training wrote there stay.

        Args:
            dir_path: the folder.
            overwrite: replace a model that is there.
            **unsupported: refused by name.

        Raises:
            ModelError: there is a model already.
            SpaceError: the disk is full; the folder stays what it was.
        """
        refuse("save", unsupported)
        if ranks.rank():  # of several processes that have trained it, one writes it
            return
        description = {
            "model": type(self).__name__,
            "origin": self.origin,
            "config": asdict(self.config),  # type: ignore[call-overload]
            "fields": json.loads(self.fields.to_json()),
            "plan": asdict(self.plan),
            "split": self._split,
            "looks_like": self._looks_like,
            "freeze": None if self._freeze is None else asdict(self._freeze),
            "training": self._training,
            "records": [asdict(record) for record in self.records],
            "checks": [asdict(check) for check in self.checks],
        }
        write_folder(Path(dir_path), description, self.module, overwrite=overwrite)

    @classmethod
    def load(cls, dir_path: str | Path, adata: Data | None = None, **unsupported: object) -> Any:
        """Read a model that `save` wrote; no code of the folder is run.

        Args:
            dir_path: the folder.
            adata: data to go with it; it need not have been set up. Methods can also be given data later.
            **unsupported: refused by name.

        Raises:
            ModelError: the folder is not a model of this class.
            VersionError: it was written by a newer atlasvi.
        """
        refuse("load", unsupported)
        path = Path(dir_path)
        description = read_description(path)
        if description.get("model") != cls.__name__:
            raise ModelError(
                f"{str(path)!r} is a {description.get('model')}, not a {cls.__name__}: use that class"
            )
        try:
            fields = FieldMap.from_json(json.dumps(description["fields"]))
            model = cls.without_data(cls.config_type(**description["config"]), fields)
            model.origin = description.get("origin")
            model.plan = TrainingPlan(**description["plan"])
            model.records = [EpochRecord(**record) for record in description["records"]]
            model.checks = [Check(**check) for check in description.get("checks", [])]
            model._split = description["split"]
            model._training = description["training"]
            # Folders of earlier versions do not say.
            model._looks_like, freeze = description.get("looks_like"), description.get("freeze")
            model._freeze = None if freeze is None else Freeze(**freeze)
        except (KeyError, TypeError, OptionError) as error:
            raise ModelError(
                f"{str(path / DESCRIPTION)!r} is damaged ({error}); copy the folder again"
            ) from error
        read_weights(path, model.module)
        if adata is not None:
            model.atlas, model._codes = model._data(adata)
        return model

    # --- inside -----------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _must_be_trained(self) -> None:
        if not self.is_trained:
            raise NotTrainedError(f"this {type(self).__name__} is not trained; call train() first")

    def _must_encode(self) -> None:
        if not isinstance(self.module, Encodes):
            raise OptionError(f"{type(self).__name__} has no latent; ask it for predict()")

    def _data(self, data: Data | None) -> tuple[Atlas, Codes]:
        """The data to work on, in the model's terms; new data are registered as the model's were."""
        if data is None:
            if self.atlas is None or self._codes is None:
                raise OptionError(
                    f"this {type(self).__name__} was loaded without data; pass some, or load it with adata="
                )
            return self.atlas, self._codes
        # Counts are taken from where they were at training; an Atlas says itself where its counts are.
        atlas = with_cells(as_atlas(data, layer=self.fields.layer))
        # Labels that nothing is asked of need not be there, nor be known.
        uses_labels = getattr(self.config, "dispersion", None) == "gene-label"
        return atlas, resolve(self.fields if uses_labels else replace(self.fields, labels_key=None), atlas)

    def _rows(self, data: Data | None, indices: Any) -> NDArray[np.int64]:
        atlas = self._data(data)[0]
        return (
            atlas.row_numbers if indices is None else atlas.row_numbers[cell_positions(indices, atlas.n_obs)]
        )

    def _names(self, data: Data | None, indices: Any) -> NDArray[np.object_]:
        atlas = self._data(data)[0]
        names: NDArray[np.object_] = atlas.obs_names.astype(object)
        return names if indices is None else names[cell_positions(indices, atlas.n_obs)]

    @staticmethod
    def _at_once(batch_size: int | None) -> int:
        return INFERENCE_BATCH if batch_size is None else at_least_one("batch_size", batch_size)

    def _minibatches(self, data: Data | None, indices: Any, batch_size: int | None) -> Iterator[Minibatch]:
        atlas, codes = self._data(data)
        epochs = Epochs(
            atlas, codes, shuffle=False,
            batch_size=self._at_once(batch_size),
            positions=None if indices is None else cell_positions(indices, atlas.n_obs),
        )  # fmt: skip
        return epochs()


__all__ = ["INFERENCE_BATCH", "Config", "Model", "Module"]
