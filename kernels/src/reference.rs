//! The scalar backend: one plain loop per operation, in the order of the formulas.
//!
//! Slow on purpose. It is what every other backend is compared with, and it is a whole backend, so
//! that a model can be run on it.

use crate::{
    backend::{
        AttentionShape, Backend, CacheRows, CacheShape, Expert, ExpertShape, GateShape, GroupScore,
        HeadRows, HeadView, KvType, RopeLayout, RowView, Scoring, StepInputs, StepShape,
        WeightStore,
    },
    matrix::Matrix,
    quant,
};

/// The scalar backend.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reference;

/// Chosen experts per row.
#[derive(Debug, Clone, Default)]
pub struct Routes {
    /// `[rows][top_k]`, ascending expert index: (expert, weight).
    pub chosen: Vec<Vec<(usize, f32)>>,
}

impl WeightStore for Reference {
    type Buffer = Vec<f32>;
    type Weight = Vec<Matrix>;

    fn upload(&self, values: &[f32]) -> Vec<f32> {
        values.to_vec()
    }

    fn weight(&self, parts: Vec<Matrix>) -> Vec<Matrix> {
        parts
    }

    fn latent_weight(&self, matrix: Matrix) -> Vec<Matrix> {
        vec![matrix]
    }
}

impl Backend for Reference {
    type Routes = Routes;
    type Cache = Vec<f32>;

    fn buffer(&self, len: usize) -> Vec<f32> {
        vec![0.0; len]
    }

    fn kv_type(&self) -> KvType {
        KvType::F32
    }

    /// Keys `[n_kv_heads, head_dim, block_len]`, then values `[n_kv_heads, block_len, head_dim]`;
    /// or rows of latent and rotary key.
    fn cache(&self, shape: CacheShape) -> Vec<f32> {
        vec![0.0; shape.size()]
    }

    fn cache_block<'a>(&self, cache: &'a Vec<f32>, shape: CacheShape, block: usize) -> &'a [u8] {
        let n = shape.block_size();
        bytemuck::cast_slice(&cache[block * n..][..n])
    }

    fn cache_block_mut<'a>(
        &self,
        cache: &'a mut Vec<f32>,
        shape: CacheShape,
        block: usize,
    ) -> &'a mut [u8] {
        let n = shape.block_size();
        bytemuck::cast_slice_mut(&mut cache[block * n..][..n])
    }

    fn download<'a>(&self, buffer: &'a mut Vec<f32>, len: usize) -> &'a mut [f32] {
        &mut buffer[..len]
    }

    fn scratch_bytes(&self, _shape: &StepShape) -> usize {
        0
    }

    fn reserve(&self, _shape: &StepShape) {}

    fn routes(&self, _shape: ExpertShape) -> Routes {
        Routes::default()
    }

    fn embed(&self, table: &Vec<Matrix>, first: usize, tokens: &[u32], out: &mut Vec<f32>) {
        let table = &table[0];
        for (row, token) in out.chunks_exact_mut(table.n_cols()).zip(tokens) {
            match (*token as usize).checked_sub(first) {
                Some(index) if index < table.n_rows() => quant::decode_row(table, index, row),
                _ => row.fill(0.0),
            }
        }
    }

    fn linear(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        weight: &Vec<Matrix>,
        bias: Option<&Vec<f32>>,
        out: &mut Vec<f32>,
    ) {
        let (n, k) = (n_outputs(weight), weight[0].n_cols());
        let rows = weight
            .iter()
            .flat_map(|part| (0..part.n_rows()).map(move |row| decoded(part, row)));
        for (output, row) in rows.enumerate() {
            for m in 0..n_rows {
                let start = bias.map_or(0.0, |b| b[output]);
                out[m * n + output] = start + dot(&row, &x[m * k..][..k]);
            }
        }
    }

    fn mlp(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        [gate, up, down]: [(&Vec<Matrix>, Option<&Vec<f32>>); 3],
        [inner, ups]: [&mut Vec<f32>; 2],
        out: &mut Vec<f32>,
    ) {
        self.linear(x, n_rows, gate.0, gate.1, inner);
        self.linear(x, n_rows, up.0, up.1, ups);
        let n = n_rows * n_outputs(gate.0);
        for (g, u) in inner[..n].iter_mut().zip(ups) {
            *g = silu(*g) * *u;
        }
        self.linear(inner, n_rows, down.0, down.1, out);
    }

    fn rms_norm(
        &self,
        x: &Vec<f32>,
        rows: RowView,
        n_rows: usize,
        gain: &Vec<f32>,
        eps: f32,
        out: &mut Vec<f32>,
    ) {
        for m in 0..n_rows {
            let row = &x[rows.offset + m * rows.stride..][..rows.width];
            let scale = rms_scale(row, eps);
            for (i, value) in out[m * rows.width..][..rows.width].iter_mut().enumerate() {
                *value = row[i] * scale * gain[i];
            }
        }
    }

    fn rms_norm_heads(
        &self,
        x: &mut Vec<f32>,
        n_rows: usize,
        heads: HeadView,
        gain: &Vec<f32>,
        eps: f32,
    ) {
        for_each_head(x, n_rows, heads, |_, _, head| {
            let scale = rms_scale(head, eps);
            for (value, g) in head.iter_mut().zip(gain) {
                *value *= scale * g;
            }
        });
    }

    fn clear(&self, x: &mut Vec<f32>, len: usize) {
        x[..len].fill(0.0);
    }

    fn add_rms_norm(
        &self,
        x: &mut Vec<f32>,
        y: &Vec<f32>,
        n_rows: usize,
        width: usize,
        gain: &Vec<f32>,
        eps: f32,
        out: &mut Vec<f32>,
    ) {
        for (a, b) in x[..n_rows * width].iter_mut().zip(y) {
            *a += b;
        }
        self.rms_norm(x, RowView::dense(width), n_rows, gain, eps, out);
    }

    fn copy_rows(
        &self,
        from: &Vec<f32>,
        from_rows: RowView,
        to: &mut Vec<f32>,
        to_rows: RowView,
        n_rows: usize,
    ) {
        for m in 0..n_rows {
            let row = &from[from_rows.offset + m * from_rows.stride..][..from_rows.width];
            to[to_rows.offset + m * to_rows.stride..][..to_rows.width].copy_from_slice(row);
        }
    }

    fn keep_rows(&self, x: &mut Vec<f32>, rows: &[usize], width: usize) {
        keep_rows(x, rows, width);
    }

    fn rope_angles(
        &self,
        inverse_frequencies: &[f64],
        factor: f64,
        inputs: &StepInputs<'_>,
        angles: &mut Vec<f32>,
    ) {
        rope_angles(inverse_frequencies, factor, inputs.positions, angles);
    }

    fn rope(
        &self,
        x: &mut Vec<f32>,
        n_rows: usize,
        heads: HeadView,
        layout: RopeLayout,
        angles: &Vec<f32>,
    ) {
        let half = heads.len / 2;
        for_each_head(x, n_rows, heads, |m, _, head| {
            let (cos, sin) = angles[m * heads.len..][..heads.len].split_at(half);
            for i in 0..half {
                let (a, b) = match layout {
                    RopeLayout::Halves => (i, i + half),
                    RopeLayout::Pairs => (2 * i, 2 * i + 1),
                };
                let (first, second) = (head[a], head[b]);
                head[a] = first * cos[i] - second * sin[i];
                head[b] = second * cos[i] + first * sin[i];
            }
        });
    }

    fn store_heads(
        &self,
        x: &Vec<f32>,
        keys: RowView,
        values: RowView,
        cache: &mut Vec<f32>,
        shape: CacheShape,
        inputs: &StepInputs<'_>,
    ) {
        store_heads(x, keys, values, cache, shape, inputs);
    }

    fn store_latent(
        &self,
        rows: &Vec<f32>,
        view: RowView,
        cache: &mut Vec<f32>,
        shape: CacheShape,
        inputs: &StepInputs<'_>,
    ) {
        store_latent(rows, view, cache, shape, inputs);
    }

    fn attention(
        &self,
        queries: &Vec<f32>,
        query_rows: RowView,
        cache: &Vec<f32>,
        cache_shape: CacheShape,
        attention: AttentionShape,
        inputs: &StepInputs<'_>,
        out: &mut Vec<f32>,
    ) {
        let n_heads = attention.n_heads;
        let (key_len, value_len) = match cache_shape.rows {
            CacheRows::Heads { head_dim, .. } => (head_dim, head_dim),
            CacheRows::Latent {
                latent_len,
                rope_len,
            } => (latent_len + rope_len, latent_len),
        };
        for m in 0..inputs.n_rows() {
            let n_positions = inputs.positions[m] + 1;
            let blocks = inputs.blocks_of_row(m);
            for h in 0..n_heads {
                let at = query_rows.offset + m * query_rows.stride + h * key_len;
                let query = &queries[at..][..key_len];
                let at = |t: usize| {
                    let block = blocks[t / cache_shape.block_len] as usize;
                    let start = block * cache_shape.block_size();
                    cached_row(start, t % cache_shape.block_len, cache_shape, n_heads, h)
                };
                let mut scores = (0..n_positions)
                    .map(|t| {
                        let row = at(t);
                        let key = cache[row.key..].iter().step_by(row.key_stride);
                        query.iter().zip(key).map(|(q, k)| q * k).sum::<f32>() * attention.scale
                    })
                    .collect::<Vec<_>>();
                softmax(&mut scores);
                let result = &mut out[(m * n_heads + h) * value_len..][..value_len];
                result.fill(0.0);
                for (t, p) in scores.iter().enumerate() {
                    for (o, v) in result.iter_mut().zip(&cache[at(t).value..][..value_len]) {
                        *o += p * v;
                    }
                }
            }
        }
    }

    fn absorb_keys(
        &self,
        queries: &Vec<f32>,
        heads: HeadView,
        weight: &Vec<Matrix>,
        rows_per_head: usize,
        out: &mut Vec<f32>,
        out_stride: usize,
        n_rows: usize,
    ) {
        let weight = &weight[0];
        let rank = weight.n_cols();
        for h in 0..heads.n_heads {
            for m in 0..n_rows {
                out[(m * heads.n_heads + h) * out_stride..][..rank].fill(0.0);
            }
            for d in 0..heads.len {
                let row = decoded(weight, h * rows_per_head + d);
                for m in 0..n_rows {
                    let q =
                        queries[heads.offset + m * heads.row_stride + h * heads.head_stride + d];
                    let result = &mut out[(m * heads.n_heads + h) * out_stride..][..rank];
                    for (o, w) in result.iter_mut().zip(&row) {
                        *o += q * w;
                    }
                }
            }
        }
    }

    fn per_head_linear(
        &self,
        x: &Vec<f32>,
        from: HeadView,
        n_rows: usize,
        weight: &Vec<Matrix>,
        rows: HeadRows,
        out: &mut Vec<f32>,
        to: HeadView,
    ) {
        for h in 0..from.n_heads {
            for d in 0..to.len {
                let row = decoded(&weight[0], rows.first_of(h) + d);
                for m in 0..n_rows {
                    let start = from.offset + m * from.row_stride + h * from.head_stride;
                    let at = to.offset + m * to.row_stride + h * to.head_stride + d;
                    out[at] = dot(&row, &x[start..][..from.len]);
                }
            }
        }
    }

    fn gate(
        &self,
        logits: &Vec<f32>,
        n_rows: usize,
        shape: GateShape,
        bias: Option<&Vec<f32>>,
        routes: &mut Routes,
    ) {
        routes.chosen.clear();
        for row in logits[..n_rows * shape.n_experts].chunks_exact(shape.n_experts) {
            let mut chosen = vec![(0, 0.0); shape.top_k];
            let mut scratch = GateScratch::new(shape.n_experts);
            choose_experts(
                row,
                bias.map(Vec::as_slice),
                shape,
                &mut scratch,
                &mut chosen,
            );
            routes.chosen.push(chosen);
        }
    }

    fn experts(
        &self,
        x: &Vec<f32>,
        n_rows: usize,
        experts: &[Expert<Vec<Matrix>>],
        routes: &mut Routes,
        out: &mut Vec<f32>,
    ) {
        let Some(first) = experts.first() else { return };
        let hidden = n_outputs(&first.down);
        for m in 0..n_rows {
            let input = &x[m * hidden..][..hidden];
            for &(expert, weight) in &routes.chosen[m] {
                let expert = &experts[expert];
                let inner = (0..n_outputs(&expert.gate))
                    .map(|i| {
                        let gate = dot(&decoded(&expert.gate[0], i), input);
                        silu(gate) * dot(&decoded(&expert.up[0], i), input)
                    })
                    .collect::<Vec<_>>();
                for (i, o) in out[m * hidden..][..hidden].iter_mut().enumerate() {
                    *o += weight * dot(&decoded(&expert.down[0], i), &inner);
                }
            }
        }
    }
}

/// Scratch of [`choose_experts`].
#[derive(Debug, Clone)]
pub struct GateScratch {
    scores: Vec<f32>,
    choice: Vec<f32>,
    groups: Vec<(usize, f32)>,
    order: Vec<(usize, f32)>,
}

impl GateScratch {
    /// Room for `n_experts`.
    pub fn new(n_experts: usize) -> Self {
        Self {
            scores: Vec::with_capacity(n_experts),
            choice: Vec::with_capacity(n_experts),
            groups: Vec::with_capacity(n_experts),
            order: Vec::with_capacity(n_experts),
        }
    }
}

/// Chooses one row's experts into `chosen` (`top_k` entries, ascending expert index). Ties go to
/// the lower index. Bias counts for the choice only, never for the weight.
pub fn choose_experts(
    logits: &[f32],
    bias: Option<&[f32]>,
    shape: GateShape,
    scratch: &mut GateScratch,
    chosen: &mut [(usize, f32)],
) {
    let GateScratch {
        scores,
        choice,
        groups,
        order,
    } = scratch;
    scores.clear();
    match shape.scoring {
        Scoring::Sigmoid => scores.extend(logits.iter().map(|z| 1.0 / (1.0 + (-z).exp()))),
        Scoring::Softmax => {
            scores.extend_from_slice(logits);
            softmax(scores);
        }
    }
    choice.clear();
    choice.extend_from_slice(scores);
    if let Some(bias) = bias {
        choice.iter_mut().zip(bias).for_each(|(c, b)| *c += b);
    }
    // Total also with NaN, which a damaged weight brings: sorting panics otherwise. Adding zero
    // makes minus zero plus zero.
    let key = |score: f32| {
        if score.is_nan() {
            f32::NEG_INFINITY
        } else {
            score + 0.0
        }
    };
    let better =
        |a: &(usize, f32), b: &(usize, f32)| key(b.1).total_cmp(&key(a.1)).then(a.0.cmp(&b.0));
    if let Some(limit) = shape.groups {
        let group_len = shape.n_experts / limit.n_groups;
        groups.clear();
        groups.extend(
            choice
                .chunks_exact(group_len)
                .map(group_score(limit.group_score))
                .enumerate(),
        );
        groups.sort_unstable_by(better);
        // Minus infinity, not zero: biased scores may be negative.
        for (group, _) in &groups[limit.top_groups..] {
            choice[group * group_len..][..group_len].fill(f32::NEG_INFINITY);
        }
    }
    order.clear();
    order.extend(choice.iter().copied().enumerate());
    if 0 < shape.top_k && shape.top_k < order.len() {
        order.select_nth_unstable_by(shape.top_k - 1, better);
    }
    order.truncate(shape.top_k);
    order.sort_unstable_by_key(|(expert, _)| *expert);
    let sum = order.iter().map(|(expert, _)| scores[*expert]).sum::<f32>() + 1e-20;
    for (slot, (expert, _)) in chosen.iter_mut().zip(&*order) {
        let weight = if shape.normalize {
            scores[*expert] / sum
        } else {
            scores[*expert]
        };
        *slot = (*expert, weight * shape.scale);
    }
}

fn group_score(kind: GroupScore) -> impl Fn(&[f32]) -> f32 {
    move |group| {
        let mut best = [f32::NEG_INFINITY; 2];
        for &score in group {
            if best[0] < score {
                best = [score, best[0]];
            } else if best[1] < score {
                best[1] = score;
            }
        }
        match kind {
            GroupScore::Max => best[0],
            GroupScore::TopTwoSum if group.len() < 2 => best[0],
            GroupScore::TopTwoSum => best[0] + best[1],
        }
    }
}

/// [`Backend::keep_rows`].
pub(crate) fn keep_rows(x: &mut [f32], rows: &[usize], width: usize) {
    assert!(rows.is_sorted_by(|a, b| a < b), "rows ascend");
    for (to, from) in rows.iter().enumerate() {
        x.copy_within(from * width..(from + 1) * width, to * width);
    }
}

/// `[cos.., sin..] * factor` per position, computed in f64: angles reach 1e5 rad at long context.
pub fn rope_angles(
    inverse_frequencies: &[f64],
    factor: f64,
    positions: &[usize],
    angles: &mut [f32],
) {
    let half = inverse_frequencies.len();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "f32 result"
    )]
    for (row, position) in angles.chunks_exact_mut(2 * half).zip(positions) {
        for (i, frequency) in inverse_frequencies.iter().enumerate() {
            let (sin, cos) = (*position as f64 * frequency).sin_cos();
            row[i] = (cos * factor) as f32;
            row[half + i] = (sin * factor) as f32;
        }
    }
}

/// Copies keys and values into their blocks.
fn store_heads(
    x: &[f32],
    keys: RowView,
    values: RowView,
    cache: &mut [f32],
    shape: CacheShape,
    inputs: &StepInputs<'_>,
) {
    let CacheRows::Heads {
        n_kv_heads,
        head_dim,
    } = shape.rows
    else {
        unreachable!("keys and values go to a cache of heads")
    };
    for m in 0..inputs.n_rows() {
        let position = inputs.positions[m];
        let block = inputs.blocks_of_row(m)[position / shape.block_len] as usize;
        for head in 0..n_kv_heads {
            let to = cached_row(
                block * shape.block_size(),
                position % shape.block_len,
                shape,
                n_kv_heads,
                head,
            );
            let key = keys.offset + m * keys.stride + head * head_dim;
            let key = &x[key..][..head_dim];
            for (to, k) in cache[to.key..].iter_mut().step_by(to.key_stride).zip(key) {
                *to = *k;
            }
            let value = values.offset + m * values.stride + head * head_dim;
            cache[to.value..][..head_dim].copy_from_slice(&x[value..][..head_dim]);
        }
    }
}

/// Copies latent rows into their blocks.
fn store_latent(
    rows: &[f32],
    view: RowView,
    cache: &mut [f32],
    shape: CacheShape,
    inputs: &StepInputs<'_>,
) {
    for m in 0..inputs.n_rows() {
        let position = inputs.positions[m];
        let block = inputs.blocks_of_row(m)[position / shape.block_len] as usize;
        let to = block * shape.block_size() + position % shape.block_len * view.width;
        cache[to..][..view.width]
            .copy_from_slice(&rows[view.offset + m * view.stride..][..view.width]);
    }
}

/// Where one position of one query head lies in the cache.
#[derive(Debug, Clone, Copy)]
struct CachedRow {
    /// First element of the key.
    key: usize,
    /// Elements between the key's dimensions.
    key_stride: usize,
    /// First element of the value.
    value: usize,
}

/// Position `t` of the block at `block_start` for query head `head` of `n_heads`.
fn cached_row(
    block_start: usize,
    t: usize,
    shape: CacheShape,
    n_heads: usize,
    head: usize,
) -> CachedRow {
    match shape.rows {
        CacheRows::Heads {
            n_kv_heads,
            head_dim,
        } => {
            let kv_head = head / (n_heads / n_kv_heads);
            let first = block_start + kv_head * shape.block_len * head_dim;
            CachedRow {
                key: first + t,
                key_stride: shape.block_len,
                value: first + (n_kv_heads * shape.block_len + t) * head_dim,
            }
        }
        CacheRows::Latent {
            latent_len,
            rope_len,
        } => {
            let row = block_start + t * (latent_len + rope_len);
            CachedRow {
                key: row,
                key_stride: 1,
                value: row,
            }
        }
    }
}

fn n_outputs(weight: &[Matrix]) -> usize {
    weight.iter().map(Matrix::n_rows).sum()
}

fn decoded(matrix: &Matrix, row: usize) -> Vec<f32> {
    let mut values = vec![0.0; matrix.n_cols()];
    quant::decode_row(matrix, row, &mut values);
    values
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn rms_scale(row: &[f32], eps: f32) -> f32 {
    #[expect(clippy::cast_precision_loss, reason = "row lengths are far below 2^24")]
    let mean = row.iter().map(|v| v * v).sum::<f32>() / row.len() as f32;
    1.0 / (mean + eps).sqrt()
}

/// `x * sigmoid(x)`.
pub fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

fn softmax(values: &mut [f32]) {
    let largest = values.iter().fold(f32::NEG_INFINITY, |a, v| a.max(*v));
    let mut sum = 0.0;
    for v in &mut *values {
        *v = (*v - largest).exp();
        sum += *v;
    }
    values.iter_mut().for_each(|v| *v /= sum);
}

fn for_each_head(
    x: &mut [f32],
    n_rows: usize,
    heads: HeadView,
    mut body: impl FnMut(usize, usize, &mut [f32]),
) {
    for m in 0..n_rows {
        for h in 0..heads.n_heads {
            let start = heads.offset + m * heads.row_stride + h * heads.head_stride;
            body(m, h, &mut x[start..][..heads.len]);
        }
    }
}
