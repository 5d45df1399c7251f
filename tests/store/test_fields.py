"""Registration: levels, numbers and genes, and one clear error for each thing that can be wrong."""

import copy
import json

import anndata
import numpy as np
import pandas as pd
import pytest

from atlasvi.errors import GenesError, ObsError, OptionError
from atlasvi.store.atlas import Atlas
from atlasvi.store.fields import as_level, from_uns, match_genes, register, resolve, uns_entry
from atlasvi.types import FieldMap


def with_obs(adata, **columns):
    adata = adata.copy()
    for key, values in columns.items():
        adata.obs[key] = values
    return Atlas.from_anndata(adata)


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_registered(adata):
    fields = register(
        Atlas.from_anndata(adata),
        batch_key="batch",
        labels_key="cell_type",
        size_factor_key="size_factor",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
    )
    assert fields.var_names == tuple(adata.var_names)
    assert fields.batch_categories == ("b1", "b2")
    assert fields.labels_categories == ("T", "B", "NK")  # the order of the categorical, not the alphabet
    assert fields.categorical_covariate_categories == (("d0", "d1", "d2", "d3"),)
    assert fields.n_levels == (4,)
    assert (fields.layer, fields.gene_mask) == (None, None)


def test_nothing_registered_is_one_batch(adata):
    fields = register(Atlas.from_anndata(adata))
    assert (fields.n_batch, fields.n_labels, fields.n_levels) == (1, 1, ())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2, 10, 1], ("1", "2", "10")),
        ([2.0, 10.0, 1.0], ("1", "2", "10")),
        ([0.5, 2.0, 1.5], ("0.5", "1.5", "2")),
        ([True, False, True], ("False", "True")),
        (["b", "a", "b"], ("a", "b")),
        (np.array(["b", "a", "b"], object), ("a", "b")),
        (np.array([1, "a", "1"], object), ("1", "a")),
        (pd.Categorical(["z", "a", "z"], categories=["z", "unused", "a"]), ("z", "a")),
        (pd.Categorical([3, 1, 3]), ("1", "3")),
        (pd.array([3, 1, 3], dtype="Int64"), ("1", "3")),
        (pd.array(["x", "y", "x"], dtype="string"), ("x", "y")),
    ],
)
def test_levels_are_text_of_those_that_cells_have(values, expected):
    obs = pd.DataFrame({"batch": values}, index=["c1", "c2", "c3"])
    atlas = Atlas.from_anndata(anndata.AnnData(np.ones((3, 2), np.float32), obs=obs))
    fields = register(atlas, batch_key="batch")
    assert fields.batch_categories == expected
    codes = resolve(fields, atlas).batch_index
    assert [fields.batch_categories[code] for code in codes] == [as_level(value) for value in values]


def test_numbers_and_their_text_are_the_same_level_at_prediction(adata):
    n = adata.n_obs
    fields = register(with_obs(adata, plate=np.arange(n) % 3), batch_key="plate")
    for same in ((np.arange(n) % 3).astype(float), (np.arange(n) % 3).astype(str)):
        codes = resolve(fields, with_obs(adata, plate=same))
        np.testing.assert_array_equal(codes.batch_index, np.arange(n) % 3)


def test_codes_follow_training_not_the_categories_of_the_query(adata):
    fields = register(Atlas.from_anndata(adata), batch_key="batch")
    query = adata[:50].copy()
    query.obs["batch"] = query.obs["batch"].cat.reorder_categories(["b2", "b1"])
    codes = resolve(fields, Atlas.from_anndata(query))
    np.testing.assert_array_equal(codes.batch_index, adata.obs["batch"].cat.codes[:50])


def test_codes_are_small():
    obs = pd.DataFrame({"batch": [f"b{i:03}" for i in range(200)]}, index=[f"c{i}" for i in range(200)])
    atlas = Atlas.from_anndata(anndata.AnnData(np.ones((200, 2), np.float32), obs=obs))
    codes = resolve(register(atlas, batch_key="batch"), atlas)
    assert codes.batch_index.dtype == np.int16
    assert codes.labels.dtype == np.int8
    np.testing.assert_array_equal(codes.batch_index, np.arange(200))


def test_a_missing_column_is_named_with_near_ones(adata):
    with pytest.raises(ObsError, match="no column 'bacth'; did you mean 'batch'\\?") as caught:
        register(Atlas.from_anndata(adata), batch_key="bacth")
    one_line(caught)
    with pytest.raises(ObsError, match="no column 'xyzzy'; it has 'batch', 'cell_type'"):
        register(Atlas.from_anndata(adata), labels_key="xyzzy")


@pytest.mark.parametrize("kind", ["categorical", "object", "float", "nullable"])
def test_a_batch_column_with_gaps_is_refused(adata, kind):
    values = np.where(np.arange(300) % 2, "x", "y").astype(object)
    values[[4, 9, 200]] = None
    if kind == "categorical":
        values = pd.Categorical(values)
    elif kind == "float":
        values = np.where(pd.isna(values), np.nan, 1.0)
    elif kind == "nullable":
        values = pd.array(values, dtype="string")
    atlas = with_obs(adata, plate=values)
    message = "'plate' of AnnData has no value at 3 cells, the first 'cell-4'"
    with pytest.raises(ObsError, match=message) as caught:
        register(atlas, batch_key="plate")
    one_line(caught)
    fields = register(with_obs(adata, plate="x"), batch_key="plate")
    with pytest.raises(ObsError, match="no value at 3 cells"):
        resolve(fields, atlas)


def test_a_level_that_training_never_saw_is_named_with_the_known_ones(adata):
    fields = register(Atlas.from_anndata(adata), batch_key="batch")
    query = with_obs(adata, batch=np.where(np.arange(300) < 7, "b9", "b1"))
    message = "'b9' at 7 cells, which training never saw; it knows 'b1', 'b2'"
    with pytest.raises(ObsError, match=message) as caught:
        resolve(fields, query)
    one_line(caught)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300, 1e30])
def test_covariates_must_be_finite(adata, bad):
    age = adata.obs["age"].to_numpy(float)
    age[7] = bad
    with pytest.raises(ObsError, match=r"'age' of AnnData is .* at cell 'cell-7' \(1 such cells\)") as caught:
        register(with_obs(adata, age=age), continuous_covariate_keys=["age"])
    one_line(caught)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_size_factors_must_be_positive(adata, bad):
    factor = adata.obs["size_factor"].to_numpy()
    factor[3] = bad
    with pytest.raises(ObsError, match=r"at cell 'cell-3' .* a number > 0 and at most 1e\+15"):
        register(with_obs(adata, size_factor=factor), size_factor_key="size_factor")


def test_text_is_not_a_covariate(adata):
    with pytest.raises(ObsError, match="'donor' of AnnData must hold numbers"):
        register(Atlas.from_anndata(adata), continuous_covariate_keys=["donor"])


def test_nullable_numbers_are_numbers_unless_they_have_gaps(adata):
    whole = pd.array(np.arange(300), dtype="Int64")
    atlas = with_obs(adata, age=whole)
    codes = resolve(register(atlas, continuous_covariate_keys=["age"]), atlas)
    np.testing.assert_array_equal(codes.cont_covs[:, 0], np.arange(300))
    gaps = whole.copy()
    gaps[5] = pd.NA
    with pytest.raises(ObsError, match="at cell 'cell-5'"):
        register(with_obs(adata, age=gaps), continuous_covariate_keys=["age"])


def test_a_text_where_a_list_is_meant(adata):
    with pytest.raises(OptionError, match="pass \\['donor'\\]"):
        register(Atlas.from_anndata(adata), categorical_covariate_keys="donor")


def test_another_layer_than_the_atlas_has(adata):
    adata.layers["counts"] = adata.X
    atlas = Atlas.from_anndata(adata, layer="counts")
    assert register(atlas, layer="counts").layer == "counts"
    message = "layer=None was asked for but AnnData was opened with layer='counts'"
    with pytest.raises(OptionError, match=message):
        register(atlas)


def test_a_gene_mask_chooses_the_genes(adata):
    fields = register(Atlas.from_anndata(adata), gene_mask="highly_variable")
    assert fields.var_names == tuple(adata.var_names[adata.var["highly_variable"]])
    codes = resolve(fields, Atlas.from_anndata(adata))
    np.testing.assert_array_equal(codes.gene_columns, np.arange(0, 60, 3))
    assert fields.gene_mask == "highly_variable"


@pytest.mark.parametrize(
    ("column", "message"),
    [(None, "no column 'mask'"), (1.5, "not true or false"), (False, "chooses none of 60 genes")],
)
def test_a_gene_mask_that_is_none(adata, column, message):
    if column is not None:
        adata.var["mask"] = column
    with pytest.raises(GenesError, match=message) as caught:
        register(Atlas.from_anndata(adata), gene_mask="mask")
    one_line(caught)


def test_genes_in_another_order_are_matched_in_silence(adata):
    fields = register(Atlas.from_anndata(adata))
    order = np.random.default_rng(0).permutation(60)
    query = adata[:, order].copy()
    columns = resolve(fields, Atlas.from_anndata(query)).gene_columns
    assert list(query.var_names[columns]) == list(adata.var_names)


def test_more_genes_than_the_models_are_no_matter(adata):
    fields = register(Atlas.from_anndata(adata[:, 10:20].copy()))
    np.testing.assert_array_equal(resolve(fields, Atlas.from_anndata(adata)).gene_columns, np.arange(10, 20))


def test_missing_genes_are_named_up_to_five_and_counted(adata):
    fields = register(Atlas.from_anndata(adata))
    message = "lacks 2 of the model's 60 genes: 'gene-3', 'gene-5'; give"
    with pytest.raises(GenesError, match=message) as caught:
        resolve(fields, Atlas.from_anndata(adata[:, np.setdiff1d(np.arange(60), [3, 5])].copy()))
    one_line(caught)
    with pytest.raises(GenesError, match=r"lacks 50 .* 'gene-4' and 45 more"):
        resolve(fields, Atlas.from_anndata(adata[:, 50:].copy()))


def test_genes_that_stand_twice(adata):
    names = list(adata.var_names)
    names[8] = "gene-7"
    adata.var_names = names
    with pytest.raises(GenesError, match="'gene-7' more than once"):
        register(Atlas.from_anndata(adata))
    with pytest.raises(GenesError, match="'gene-7' more than once"):
        match_genes(["gene-1", "gene-7"], Atlas.from_anndata(adata))
    assert match_genes(["gene-9", "gene-1"], Atlas.from_anndata(adata)).tolist() == [9, 1]
    with pytest.raises(GenesError, match="has no genes"):
        register(Atlas.from_anndata(adata)[:, []])


def test_the_entry_in_uns_is_json_and_all_that_changes(adata):
    before = adata.copy()
    fields = register(Atlas.from_anndata(adata), batch_key="batch", categorical_covariate_keys=["donor"])
    adata.uns["atlasvi"] = uns_entry(fields)
    assert json.loads(adata.uns["atlasvi"])["batch_key"] == "batch"
    assert from_uns(adata) == fields
    assert list(adata.uns) == ["atlasvi"]
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    assert (adata.X != before.X).nnz == 0


def test_the_entry_survives_files(adata, tmp_path):
    fields = register(Atlas.from_anndata(adata), batch_key="batch", continuous_covariate_keys=["age"])
    adata.uns["atlasvi"] = uns_entry(fields)
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert from_uns(anndata.read_h5ad(tmp_path / "a.h5ad")) == fields


def test_no_entry_and_a_broken_one(adata):
    assert from_uns(adata) is None
    for broken in ("not json", "{}", '{"nothing": 1}'):
        adata.uns["atlasvi"] = broken
        with pytest.raises(OptionError, match="run setup_anndata again"):
            from_uns(adata)


def test_registering_does_not_change_what_it_looks_at(adata):
    before = copy.deepcopy(adata.obs)
    register(Atlas.from_anndata(adata), batch_key="batch", labels_key="donor")
    pd.testing.assert_frame_equal(adata.obs, before)


def test_a_field_map_goes_through_json(adata):
    fields = register(Atlas.from_anndata(adata), batch_key="batch", categorical_covariate_keys=["donor"])
    assert FieldMap.from_json(fields.to_json()) == fields
