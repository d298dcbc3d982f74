/* The kernels of cpu_kernels.c for one dtype: STORED in memory, computed as ACCUMULATED; INTEGER is as wide. */

#define LANES ((Index)(32 / sizeof(ACCUMULATED)))
#define Vector NAME(Vector)
#define Mask NAME(Mask)
typedef ACCUMULATED Vector VECTOR;
typedef INTEGER Mask VECTOR;

INLINE Vector NAME(all)(ACCUMULATED value)
{
    Vector vector = {0};
    return vector + value;
}

INLINE Vector NAME(pick)(Mask where, Vector a, Vector b) { return (Vector)((where & (Mask)a) | (~where & (Mask)b)); }

INLINE Mask NAME(pick_index)(Mask where, Mask a, Mask b) { return (where & a) | (~where & b); }

/* Of the first lanes, `count` of them or all. */
INLINE Mask NAME(first_lanes)(Index count)
{
    Mask lanes = {0};
    for (Index lane = 0; lane < LANES; lane++) lanes[lane] = lane < count ? -1 : 0;
    return lanes;
}

/* Numbers to compute with from memory, `count` of at most LANES; the other lanes are 0. */
INLINE Vector NAME(get)(const ACCUMULATED *from, Index count)
{
    Vector vector = {0};
    memcpy(&vector, from, (size_t)count * sizeof(ACCUMULATED));
    return vector;
}

INLINE void NAME(put)(ACCUMULATED *to, Vector vector, Index count)
{
    memcpy(to, &vector, (size_t)count * sizeof(ACCUMULATED));
}

/* Elements of a tensor, from memory and to it. */
#ifdef BFLOAT16
typedef uint16_t NAME(Half) __attribute__((vector_size(16)));

INLINE Vector NAME(load)(const STORED *from, Index count)
{
    NAME(Half) half = {0};
    memcpy(&half, from, (size_t)count * sizeof(STORED));
    return (Vector)(__builtin_convertvector(half, Mask) << 16);
}

INLINE void NAME(store)(STORED *to, Vector vector, Index count)
{
    /* Rounded to the nearest, of two the even one. NaN stays NaN. */
    typedef uint32_t Bits VECTOR;
    Bits bits = (Bits)vector;
    Bits rounded = bits + 0x7fff + ((bits >> 16) & 1);
    Bits nan = (Bits)(vector != vector);
    bits = ((nan & 0x7fc00000) | (~nan & rounded)) >> 16;
    NAME(Half) half = __builtin_convertvector(bits, NAME(Half));
    memcpy(to, &half, (size_t)count * sizeof(STORED));
}
#else
INLINE Vector NAME(load)(const STORED *from, Index count) { return NAME(get)(from, count); }

INLINE void NAME(store)(STORED *to, Vector vector, Index count) { NAME(put)(to, vector, count); }
#endif

INLINE ACCUMULATED NAME(element)(const STORED *from) { return NAME(load)(from, 1)[0]; }

INLINE ACCUMULATED NAME(sum)(Vector vector)
{
    ACCUMULATED total = 0;
    for (Index lane = 0; lane < LANES; lane++) total += vector[lane];
    return total;
}

INLINE ACCUMULATED NAME(greatest)(Vector vector)
{
    ACCUMULATED top = vector[0];
    for (Index lane = 1; lane < LANES; lane++) top = vector[lane] > top ? vector[lane] : top;
    return top;
}

/* out[n][k] = the sum of parts[n][.][k] in their order. */
static void NAME(add_parts)(const ACCUMULATED *parts, Index images, Index count, Index kept, ACCUMULATED *out)
{
    for (Index n = 0; n < images; n++, parts += count * kept, out += kept) {
        memcpy(out, parts, (size_t)kept * sizeof(ACCUMULATED));
        for (Index part = 1; part < count; part++)
            for (Index k = 0; k < kept; k++) out[k] += parts[part * kept + k];
    }
}

/* The maximum of count elements, `step` apart, and its place, as torch has it: NaN is greater than all, and of equals
   the first is taken. The elements are multiplied by *weight, weight_step apart. */
static ACCUMULATED NAME(exact_max)(const STORED *x, Index step, const ACCUMULATED *weight, Index weight_step,
                                   Index count, Index *place)
{
    ACCUMULATED top = -INFINITY;
    *place = 0;
    for (Index k = 0; k < count; k++) {
        ACCUMULATED value = NAME(element)(x + k * step);
        if (weight) value *= weight[k * weight_step];
        if (isnan(value)) {
            *place = k;
            return value;
        }
        if (value > top) {
            top = value;
            *place = k;
        }
    }
    return top;
}

/* The first k at which x[k] * weight[k] is `value`, which is there. */
INLINE Index NAME(find)(const STORED *x, const ACCUMULATED *weight, ACCUMULATED value, Index count)
{
    Index k = 0;
    for (; k + LANES <= count; k += LANES) {
        Vector there = NAME(load)(x + k, LANES);
        if (weight) there *= NAME(get)(weight + k, LANES);
        typedef int64_t Words VECTOR;
        Words equal = (Words)(there == value);
        if (equal[0] | equal[1] | equal[2] | equal[3]) break;
    }
    while (k < count - 1 && NAME(element)(x + k) * (weight ? weight[k] : 1) != value) k++;
    return k;
}

/* Sum and maximum of one row, and the chunk that holds the first such maximum. */
INLINE void NAME(pool_row)(const STORED *x, const ACCUMULATED *weight, Index columns, ACCUMULATED *total,
                           ACCUMULATED *top, Index *chunk)
{
    *total = 0;
    *top = -INFINITY;
    *chunk = 0;
    for (Index start = 0; start < columns; start += CHUNK) {
        Index end = least(start + CHUNK, columns), k = start;
        Vector sums[4] = {{0}}, tops[4];
        for (int i = 0; i < 4; i++) tops[i] = NAME(all)(-INFINITY);
        for (; k + 4 * LANES <= end; k += 4 * LANES)
            for (int i = 0; i < 4; i++) {
                Vector value = NAME(load)(x + k + i * LANES, LANES);
                if (weight) value *= NAME(get)(weight + k + i * LANES, LANES);
                sums[i] += value;
                tops[i] = NAME(pick)(value > tops[i], value, tops[i]);
            }
        for (int i = 1; i < 4; i++) tops[0] = NAME(pick)(tops[i] > tops[0], tops[i], tops[0]);
        ACCUMULATED sum = NAME(sum)((sums[0] + sums[1]) + (sums[2] + sums[3])), best = NAME(greatest)(tops[0]);
        for (; k < end; k++) {
            ACCUMULATED value = NAME(element)(x + k);
            if (weight) value *= weight[k];
            sum += value;
            best = value > best ? value : best;
        }
        *total += sum;
        if (best > *top) {
            *top = best;
            *chunk = start;
        }
    }
}

INLINE void NAME(pool_rows_of)(const STORED *x, const ACCUMULATED *weight, Index rows, Index columns,
                               ACCUMULATED *mean, ACCUMULATED *top, int32_t *argmax)
{
    for (Index r = 0; r < rows; r++, x += columns) {
        ACCUMULATED total;
        Index start, place = 0;
        NAME(pool_row)(x, weight, columns, &total, top + r, &start);
        mean[r] = total / columns;
        if (isnan(total)) { /* of NaN, or of both infinities */
            top[r] = NAME(exact_max)(x, 1, weight, 1, columns, &place);
        } else if (argmax) {
            place = start + NAME(find)(x + start, weight ? weight + start : 0, top[r], least(CHUNK, columns - start));
        }
        if (argmax) argmax[r] = (int32_t)place;
    }
}

/* For each row of each image the mean of x[n][r][k] * weight[n][k] over k in pooled[n][mean_at][r], the maximum in
   pooled[n][1 - mean_at][r], and its k in argmax[n][r]. weight and argmax may be null. */
void NAME(pool_rows)(const STORED *x, const ACCUMULATED *weight, Index images, Index rows, Index columns,
                     ACCUMULATED *pooled, Index mean_at, int32_t *argmax, int threads)
{
    ACCUMULATED *mean = pooled + mean_at * rows, *top = pooled + (1 - mean_at) * rows;
    Index block = least(ceiling(BLOCK, columns), rows), blocks = ceiling(rows, block);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Index task = 0; task < images * blocks; task++) {
        Index n = task / blocks, r = task % blocks * block, count = least(block, rows - r);
        const STORED *from = x + (n * rows + r) * columns;
        ACCUMULATED *to_mean = mean + 2 * n * rows + r, *to_top = top + 2 * n * rows + r;
        int32_t *to_argmax = argmax ? argmax + n * rows + r : 0;
        if (weight) NAME(pool_rows_of)(from, weight + n * columns, count, columns, to_mean, to_top, to_argmax);
        else NAME(pool_rows_of)(from, 0, count, columns, to_mean, to_top, to_argmax);
    }
}

/* Sums, maxima and their rows, of `columns` columns; `rows` more rows are added to what there is, from row `first`. */
INLINE void NAME(pool_step)(const STORED *x, const ACCUMULATED *weight, Index stride, Index first, const Index rows,
                            const Index columns, ACCUMULATED *sums, ACCUMULATED *tops, INTEGER *places,
                            const int with_places)
{
    Vector sum = NAME(get)(sums, LANES), top = NAME(get)(tops, LANES);
    Mask place = {0};
    if (with_places) memcpy(&place, places, sizeof place);
    for (Index r = 0; r < rows; r++) {
        Vector value = NAME(load)(x + r * stride, columns);
        if (weight) value *= weight[r];
        sum += value;
        Mask better = value > top;
        top = NAME(pick)(better, value, top);
        if (with_places) place = NAME(pick_index)(better, (Mask){0} + (INTEGER)(first + r), place);
    }
    NAME(put)(sums, sum, LANES);
    NAME(put)(tops, top, LANES);
    if (with_places) memcpy(places, &place, sizeof place);
}

INLINE void NAME(pool_tile)(const STORED *x, const ACCUMULATED *weight, Index stride, Index first, Index rows,
                            Index columns, ACCUMULATED *sums, ACCUMULATED *tops, INTEGER *places,
                            const int with_places)
{
    Index whole = columns / LANES * LANES, r = 0;
    for (Index k = 0; k < columns; k++) {
        sums[k] = 0;
        tops[k] = -INFINITY;
        places[k] = (INTEGER)first;
    }
    for (; r + FOUR <= rows; r += FOUR) {
        const ACCUMULATED *by = weight ? weight + r : 0;
        const STORED *from = x + r * stride;
        for (Index k = 0; k < whole; k += LANES)
            NAME(pool_step)(from + k, by, stride, first + r, FOUR, LANES, sums + k, tops + k, places + k, with_places);
        if (whole < columns)
            NAME(pool_step)(from + whole, by, stride, first + r, FOUR, columns - whole, sums + whole, tops + whole,
                            places + whole, with_places);
    }
    for (; r < rows; r++)
        for (Index k = 0; k < columns; k += LANES)
            NAME(pool_step)(x + r * stride + k, weight ? weight + r : 0, stride, first + r, 1,
                            least(LANES, columns - k), sums + k, tops + k, places + k, with_places);
}

/* For each column of each image the mean of x[n][r][k] * weight[n][r] over r in pooled[n][mean_at][k], the maximum in
   pooled[n][1 - mean_at][k], and its r in argmax[n][k]. weight and argmax may be null.
   parts: 3 * images * cbam_spans(rows, columns) * columns of ACCUMULATED. */
void NAME(pool_columns)(const STORED *x, const ACCUMULATED *weight, Index images, Index rows, Index columns,
                        ACCUMULATED *pooled, Index mean_at, int32_t *argmax, ACCUMULATED *parts, int threads)
{
    ACCUMULATED *mean = pooled + mean_at * columns, *top = pooled + (1 - mean_at) * columns;
    Index span = span_of(rows, columns), spans = ceiling(rows, span);
    Index tile = tile_of(columns), tiles = ceiling(columns, tile), size = images * spans * columns;
    ACCUMULATED *part_sums = parts, *part_tops = parts + size;
    INTEGER *part_places = (INTEGER *)(parts + 2 * size);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Index task = 0; task < images * spans * tiles; task++) {
        Index n = task / tiles / spans, part = task / tiles % spans, k = task % tiles * tile;
        Index r = part * span, count = least(span, rows - r), width = least(tile, columns - k);
        ACCUMULATED sums[WIDE], tops[WIDE];
        INTEGER places[WIDE];
        const STORED *from = x + (n * rows + r) * columns + k;
        const ACCUMULATED *by = weight ? weight + n * rows + r : 0;
        /* Four times the same, each with its constants. */
        if (by && argmax) NAME(pool_tile)(from, by, columns, r, count, width, sums, tops, places, 1);
        else if (by) NAME(pool_tile)(from, by, columns, r, count, width, sums, tops, places, 0);
        else if (argmax) NAME(pool_tile)(from, 0, columns, r, count, width, sums, tops, places, 1);
        else NAME(pool_tile)(from, 0, columns, r, count, width, sums, tops, places, 0);
        Index at = (n * spans + part) * columns + k;
        memcpy(part_sums + at, sums, (size_t)width * sizeof *sums);
        memcpy(part_tops + at, tops, (size_t)width * sizeof *tops);
        memcpy(part_places + at, places, (size_t)width * sizeof *places);
    }
#pragma omp parallel for num_threads(threads) if (images * columns > BLOCK)
    for (Index task = 0; task < images * columns; task++) {
        Index n = task / columns, k = task % columns, at = n * spans * columns + k;
        ACCUMULATED total = 0, best = -INFINITY;
        Index place = 0;
        for (Index part = 0; part < spans; part++, at += columns) {
            total += part_sums[at];
            if (part == 0 || part_tops[at] > best) {
                best = part_tops[at];
                place = part_places[at];
            }
        }
        if (isnan(total)) /* of NaN, or of both infinities */
            best = NAME(exact_max)(x + n * rows * columns + k, columns, weight ? weight + n * rows : 0, 1, rows, &place);
        mean[2 * n * columns + k] = total / rows;
        top[2 * n * columns + k] = best;
        if (argmax) argmax[task] = (int32_t)place;
    }
}

/* y[n][r][k] = x[n][r][k] * by_row[n][r] * by_column[n][k]. */
void NAME(scale)(const STORED *restrict x, const ACCUMULATED *by_row, const ACCUMULATED *by_column, Index images,
                 Index rows, Index columns, STORED *restrict y, int threads)
{
    Index block = least(ceiling(BLOCK, columns), rows), blocks = ceiling(rows, block);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Index task = 0; task < images * blocks; task++) {
        Index n = task / blocks, first = task % blocks * block, whole = columns / LANES * LANES;
        const ACCUMULATED *weights = by_column + n * columns;
        for (Index r = n * rows + first; r < n * rows + least(first + block, rows); r++) {
            const STORED *from = x + r * columns;
            STORED *to = y + r * columns;
            ACCUMULATED by = by_row[r];
            for (Index k = 0; k < whole; k += LANES)
                NAME(store)(to + k, NAME(load)(from + k, LANES) * by * NAME(get)(weights + k, LANES), LANES);
            for (Index k = whole; k < columns; k++)
                NAME(store)(to + k, NAME(load)(from + k, 1) * by * weights[k], 1);
        }
    }
}

INLINE Vector NAME(maps_step)(const STORED *g, const STORED *x, ACCUMULATED by_row, const ACCUMULATED *by_column,
                              ACCUMULATED *column_sums, const Index count)
{
    Vector product = NAME(load)(g, count) * NAME(load)(x, count);
    NAME(put)(column_sums, NAME(get)(column_sums, count) + product * by_row, count);
    return product * NAME(get)(by_column, count);
}

/* of_row[n][r] = sum over k of g * x * by_column[n][k], and of_column[n][k] = sum over r of g * x * by_row[n][r].
   parts: images * (cbam_spans(rows, columns) * columns + cbam_tiles(columns) * rows) of ACCUMULATED. */
void NAME(backward_maps)(const STORED *g, const STORED *x, const ACCUMULATED *by_row, const ACCUMULATED *by_column,
                         Index images, Index rows, Index columns, ACCUMULATED *of_row, ACCUMULATED *of_column,
                         ACCUMULATED *parts, int threads)
{
    Index span = span_of(rows, columns), spans = ceiling(rows, span);
    Index tile = tile_of(columns), tiles = ceiling(columns, tile);
    ACCUMULATED *column_parts = parts, *row_sums = parts + images * spans * columns;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Index task = images * spans * tiles - 1; task >= 0; task--) {
        Index n = task / tiles / spans, part = task / tiles % spans, k0 = task % tiles * tile;
        Index first = part * span, end = least(first + span, rows), width = least(tile, columns - k0);
        Index whole = width / LANES * LANES, quads = width / (4 * LANES) * (4 * LANES);
        ACCUMULATED sums[WIDE];
        const ACCUMULATED *weights = by_column + n * columns + k0;
        memset(sums, 0, (size_t)width * sizeof *sums);
        for (Index r = first; r < end; r++) {
            const STORED *from_g = g + (n * rows + r) * columns + k0, *from_x = x + (n * rows + r) * columns + k0;
            ACCUMULATED by = by_row[n * rows + r];
            Vector totals[4] = {{0}};
            Index k = 0;
            for (; k < quads; k += 4 * LANES)
                for (int i = 0; i < 4; i++) {
                    Index at = k + i * LANES;
                    __builtin_prefetch(from_g + at + columns); /* the next row's, which is on another page */
                    __builtin_prefetch(from_x + at + columns);
                    totals[i] += NAME(maps_step)(from_g + at, from_x + at, by, weights + at, sums + at, LANES);
                }
            for (; k < whole; k += LANES)
                totals[0] += NAME(maps_step)(from_g + k, from_x + k, by, weights + k, sums + k, LANES);
            if (k < width) totals[1] += NAME(maps_step)(from_g + k, from_x + k, by, weights + k, sums + k, width - k);
            row_sums[(n * tiles + k0 / tile) * rows + r] =
                NAME(sum)((totals[0] + totals[1]) + (totals[2] + totals[3]));
        }
        memcpy(column_parts + (n * spans + part) * columns + k0, sums, (size_t)width * sizeof *sums);
    }
    NAME(add_parts)(column_parts, images, spans, columns, of_column);
    NAME(add_parts)(row_sums, images, tiles, rows, of_row);
}

/* Where columns are pixels: of_row[n][r] = sum over k of x * (dmean[k] / rows + dmax[k] where argmax[n][k] == r), with
   dz[n] = [dmax, dmean]. */
void NAME(backward_pool_columns)(const STORED *x, const ACCUMULATED *dz, const INTEGER *argmax, Index images, Index rows,
                                 Index columns, ACCUMULATED *of_row, int threads)
{
    Index blocks = ceiling(rows, ROWS);
    const ACCUMULATED share = 1 / (ACCUMULATED)rows;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Index task = 0; task < images * blocks; task++) {
        Index n = task / blocks, first = task % blocks * ROWS, count = least(ROWS, rows - first);
        ACCUMULATED totals[ROWS] = {0};
        for (Index k0 = 0; k0 < columns; k0 += CHUNK) {
            Index width = least(CHUNK, columns - k0), whole = width / (2 * LANES) * (2 * LANES);
            const ACCUMULATED *dmax = dz + 2 * n * columns + k0, *dmean = dmax + columns;
            const INTEGER *places = argmax + n * columns + k0;
            for (Index r = 0; r < count; r++) {
                const STORED *from = x + (n * rows + first + r) * columns + k0;
                Mask row = (Mask){0} + (INTEGER)(first + r);
                Vector sums[2] = {{0}};
                for (Index k = 0; k < whole; k += 2 * LANES)
                    for (int i = 0; i < 2; i++) {
                        Index at = k + i * LANES;
                        Mask place;
                        memcpy(&place, places + at, sizeof place);
                        Vector top = (Vector)((place == row) & (Mask)NAME(get)(dmax + at, LANES));
                        sums[i] += NAME(load)(from + at, LANES) * (NAME(get)(dmean + at, LANES) * share + top);
                    }
                ACCUMULATED sum = NAME(sum)(sums[0] + sums[1]);
                for (Index k = whole; k < width; k++)
                    sum += NAME(element)(from + k) * (dmean[k] * share + (places[k] == first + r ? dmax[k] : 0));
                totals[r] += sum;
            }
        }
        memcpy(of_row + n * rows + first, totals, (size_t)count * sizeof *totals);
    }
}

/* Where rows are pixels: of_column[n][k] = sum over r of x * (dmean[r] / columns + dmax[r] where argmax[n][r] == k).
   parts: images * cbam_spans(rows, columns) * columns of ACCUMULATED. */
void NAME(backward_pool_rows)(const STORED *x, const ACCUMULATED *dz, const INTEGER *argmax, Index images, Index rows,
                              Index columns, ACCUMULATED *of_column, ACCUMULATED *parts, int threads)
{
    Index span = span_of(rows, columns), spans = ceiling(rows, span);
    const ACCUMULATED share = 1 / (ACCUMULATED)columns;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Index task = 0; task < images * spans; task++) {
        Index n = task / spans, first = task % spans * span, end = least(first + span, rows);
        Index whole = columns / LANES * LANES;
        const ACCUMULATED *dmax = dz + 2 * n * rows, *dmean = dmax + rows;
        ACCUMULATED *sums = parts + task * columns;
        memset(sums, 0, (size_t)columns * sizeof *sums);
        for (Index r = first; r < end; r++) {
            const STORED *from = x + (n * rows + r) * columns;
            ACCUMULATED by = dmean[r] * share;
            for (Index k = 0; k < whole; k += LANES)
                NAME(put)(sums + k, NAME(get)(sums + k, LANES) + NAME(load)(from + k, LANES) * by, LANES);
            for (Index k = whole; k < columns; k++) sums[k] += NAME(element)(from + k) * by;
            Index place = argmax[n * rows + r];
            sums[place] += NAME(element)(from + place) * dmax[r];
        }
    }
    NAME(add_parts)(parts, images, spans, columns, of_column);
}

/* The gradient of x, for channels r and pixels k: dx = (g * s[k] + dmean[k] / rows + dmax[k] where j[k] == r) * c[r]
   + davg[r] / columns + dtop[r] where i[r] == k, with dz[n] = [dmax, dmean] and dpool[n] = [davg, dtop]. */
void NAME(backward_input_columns)(const STORED *restrict g, const ACCUMULATED *c, const ACCUMULATED *s,
                                  const ACCUMULATED *dz, const INTEGER *j, const ACCUMULATED *dpool, const int32_t *i,
                                  Index images, Index rows, Index columns, STORED *restrict dx, int threads)
{
    Index blocks = ceiling(rows, ROWS);
    const ACCUMULATED row_share = 1 / (ACCUMULATED)rows, column_share = 1 / (ACCUMULATED)columns;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Index task = images * blocks - 1; task >= 0; task--) {
        Index n = task / blocks, first = task % blocks * ROWS, count = least(ROWS, rows - first);
        for (Index k0 = 0; k0 < columns; k0 += CHUNK) {
            Index width = least(CHUNK, columns - k0), whole = width / LANES * LANES;
            const ACCUMULATED *scales = s + n * columns + k0;
            const ACCUMULATED *dmax = dz + 2 * n * columns + k0, *dmean = dmax + columns;
            const INTEGER *places = j + n * columns + k0;
            for (Index r = first; r < first + count; r++) {
                Index at = (n * rows + r) * columns + k0;
                Mask row = (Mask){0} + (INTEGER)r;
                ACCUMULATED by = c[n * rows + r], added = dpool[2 * n * rows + r] * column_share;
                for (Index k = 0; k < whole; k += LANES) {
                    Mask place;
                    memcpy(&place, places + k, sizeof place);
                    Vector top = (Vector)((place == row) & (Mask)NAME(get)(dmax + k, LANES));
                    Vector value = NAME(load)(g + at + k, LANES) * NAME(get)(scales + k, LANES);
                    value = (value + (NAME(get)(dmean + k, LANES) * row_share + top)) * by + added;
                    NAME(store)(dx + at + k, value, LANES);
                }
                for (Index k = whole; k < width; k++) {
                    ACCUMULATED value = NAME(element)(g + at + k) * scales[k];
                    value = (value + (dmean[k] * row_share + (places[k] == r ? dmax[k] : 0))) * by + added;
                    NAME(store)(dx + at + k, NAME(all)(value), 1);
                }
                Index top = i[n * rows + r] - k0;
                if (top >= 0 && top < width) {
                    ACCUMULATED value = NAME(element)(g + at + top) * scales[top];
                    value = (value + (dmean[top] * row_share + (places[top] == r ? dmax[top] : 0))) * by + added;
                    NAME(store)(dx + at + top, NAME(all)(value + dpool[(2 * n + 1) * rows + r]), 1);
                }
            }
        }
    }
}

/* The same for pixels r and channels k. */
void NAME(backward_input_rows)(const STORED *restrict g, const ACCUMULATED *c, const ACCUMULATED *s,
                               const ACCUMULATED *dz, const INTEGER *j, const ACCUMULATED *dpool, const int32_t *i,
                               Index images, Index rows, Index columns, STORED *restrict dx, int threads)
{
    Index block = least(ceiling(BLOCK, columns), rows), blocks = ceiling(rows, block);
    const ACCUMULATED row_share = 1 / (ACCUMULATED)rows, column_share = 1 / (ACCUMULATED)columns;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (Index task = images * blocks - 1; task >= 0; task--) {
            Index n = task / blocks, first = task % blocks * block, whole = columns / LANES * LANES;
            const ACCUMULATED *dmax = dz + 2 * n * rows, *dmean = dmax + rows;
            const ACCUMULATED *scales = c + n * columns, *davg = dpool + 2 * n * columns;
            for (Index r = first; r < least(first + block, rows); r++) {
                Index at = (n * rows + r) * columns, place = j[n * rows + r];
                ACCUMULATED by = s[n * rows + r], mean = dmean[r] * column_share;
                for (Index k = 0; k < whole; k += LANES) {
                    Vector value = (NAME(load)(g + at + k, LANES) * by + mean) * NAME(get)(scales + k, LANES);
                    NAME(store)(dx + at + k, value + NAME(get)(davg + k, LANES) * row_share, LANES);
                }
                for (Index k = whole; k < columns; k++) {
                    ACCUMULATED value = (NAME(element)(g + at + k) * by + mean) * scales[k] + davg[k] * row_share;
                    NAME(store)(dx + at + k, NAME(all)(value), 1);
                }
                ACCUMULATED value = NAME(element)(g + at + place) * by + (mean + dmax[r]);
                NAME(store)(dx + at + place, NAME(all)(value * scales[place] + davg[place] * row_share), 1);
            }
        }
#pragma omp for
        for (Index task = 0; task < images * columns; task++) {
            Index n = task / columns, k = task % columns, r = i[task], at = (n * rows + r) * columns + k;
            const ACCUMULATED *dmax = dz + 2 * n * rows, *dmean = dmax + rows;
            const ACCUMULATED *davg = dpool + 2 * n * columns, *dtop = davg + columns;
            ACCUMULATED mean = dmean[r] * column_share + (j[n * rows + r] == k ? dmax[r] : 0);
            ACCUMULATED value = (NAME(element)(g + at) * s[n * rows + r] + mean) * c[task] + davg[k] * row_share;
            NAME(store)(dx + at, NAME(all)(value + dtop[k]), 1);
        }
    }
}

#ifndef BFLOAT16
/* Planes with size / 2 zeros around, one after the other, and room for a vector to read beyond the last. */
static void NAME(pad)(const ACCUMULATED *planes, Index count, Index height, Index width, Index size, ACCUMULATED *padded)
{
    Index half = size / 2, stride = width + 2 * half, plane = stride * (height + 2 * half);
    memset(padded, 0, (size_t)(count * plane + 4 * LANES) * sizeof *padded);
    for (Index i = 0; i < count; i++)
        for (Index y = 0; y < height; y++)
            memcpy(padded + i * plane + (y + half) * stride + half, planes + (i * height + y) * width,
                   (size_t)width * sizeof *padded);
}

/* `vectors` vectors of one row of an output. */
INLINE void NAME(convolve_step)(const ACCUMULATED *in, const ACCUMULATED *weight, Index inputs, Index plane,
                                Index stride, Index size, const Index vectors, ACCUMULATED *out, Index count)
{
    Vector sums[4] = {{0}};
    for (Index i = 0; i < inputs; i++)
        for (Index dy = 0; dy < size; dy++)
            for (Index dx = 0; dx < size; dx++) {
                const ACCUMULATED *from = in + i * plane + dy * stride + dx;
                ACCUMULATED by = weight[(i * size + dy) * size + dx];
                for (Index v = 0; v < vectors; v++) sums[v] += NAME(get)(from + v * LANES, LANES) * by;
            }
    memcpy(out, sums, (size_t)count * sizeof *out);
}

/* The convolution of planes with zeros around: out[n][o][y][x] = the sum over i, dy, dx of
   planes[n][i][y + dy - size / 2][x + dx - size / 2] * weight[o][i][dy][dx].
   padded: images * inputs * (height + size - 1) * (width + size - 1) + 32 of ACCUMULATED. */
void NAME(convolve)(const ACCUMULATED *planes, const ACCUMULATED *weight, Index images, Index inputs, Index outputs,
                    Index height, Index width, Index size, ACCUMULATED *padded, ACCUMULATED *out, int threads)
{
    Index stride = width + size - 1, plane = stride * (height + size - 1);
    NAME(pad)(planes, images * inputs, height, width, size, padded);
#pragma omp parallel for num_threads(threads)
    for (Index task = 0; task < images * outputs * height; task++) {
        Index n = task / height / outputs, o = task / height % outputs, y = task % height, x = 0;
        const ACCUMULATED *from = padded + n * inputs * plane + y * stride, *by = weight + o * inputs * size * size;
        ACCUMULATED *to = out + task * width;
        for (; x + 4 * LANES <= width; x += 4 * LANES)
            NAME(convolve_step)(from + x, by, inputs, plane, stride, size, 4, to + x, 4 * LANES);
        for (; x < width; x += LANES)
            NAME(convolve_step)(from + x, by, inputs, plane, stride, size, 1, to + x, least(LANES, width - x));
    }
}

/* The gradient of the weight of one output: dweight[i][dy][dx] = the sum over n, y, x of
   planes[n][i][y + dy - size / 2][x + dx - size / 2] * dout[n][y][x]. padded: as above; size: at most LONGEST. */
void NAME(convolve_weight)(const ACCUMULATED *planes, const ACCUMULATED *dout, Index images, Index inputs,
                           Index height, Index width, Index size, ACCUMULATED *padded, ACCUMULATED *dweight,
                           int threads)
{
    Index stride = width + size - 1, plane = stride * (height + size - 1);
    NAME(pad)(planes, images * inputs, height, width, size, padded);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (Index task = 0; task < inputs * size; task++) {
        Index i = task / size, dy = task % size;
        Vector sums[LONGEST] = {{0}};
        for (Index n = 0; n < images; n++)
            for (Index y = 0; y < height; y++) {
                const ACCUMULATED *from = padded + (n * inputs + i) * plane + (y + dy) * stride;
                const ACCUMULATED *gradient = dout + (n * height + y) * width;
                for (Index x = 0; x < width; x += LANES) {
                    Mask inside = NAME(first_lanes)(width - x);
                    Vector value = NAME(get)(gradient + x, least(LANES, width - x));
                    for (Index dx = 0; dx < size; dx++)
                        sums[dx] += value * NAME(pick)(inside, NAME(get)(from + x + dx, LANES), (Vector){0});
                }
            }
        for (Index dx = 0; dx < size; dx++) dweight[task * size + dx] = NAME(sum)(sums[dx]);
    }
}

INLINE ACCUMULATED NAME(dot)(const ACCUMULATED *a, const ACCUMULATED *b, Index count)
{
    Vector sums = {0};
    Index k = 0;
    for (; k + LANES <= count; k += LANES) sums += NAME(get)(a + k, LANES) * NAME(get)(b + k, LANES);
    return NAME(sum)(k < count ? sums + NAME(get)(a + k, count - k) * NAME(get)(b + k, count - k) : sums);
}

/* to[k] += by * from[k] */
INLINE void NAME(add_scaled)(ACCUMULATED *to, ACCUMULATED by, const ACCUMULATED *from, Index count)
{
    Index k = 0;
    for (; k + LANES <= count; k += LANES)
        NAME(put)(to + k, NAME(get)(to + k, LANES) + NAME(get)(from + k, LANES) * by, LANES);
    for (; k < count; k++) to[k] += from[k] * by;
}

/* The MLP of pooled descriptors d, `pools` of each image, without its gate: hidden[n][k] = relu(w1 d[n][k] + b1),
   total[n] = the sum of hidden[n][k] over k, z[n] = w2 total[n] + pools * b2. w1 is (units, channels), w2 its
   transpose's shape. */
void NAME(mlp)(const ACCUMULATED *d, const ACCUMULATED *w1, const ACCUMULATED *b1, const ACCUMULATED *w2,
               const ACCUMULATED *b2, Index images, Index pools, Index channels, Index units, ACCUMULATED *hidden,
               ACCUMULATED *total, ACCUMULATED *z)
{
    for (Index n = 0; n < images; n++, total += units, z += channels) {
        for (Index k = 0; k < pools; k++, d += channels, hidden += units)
            for (Index u = 0; u < units; u++) {
                ACCUMULATED value = NAME(dot)(w1 + u * channels, d, channels) + b1[u];
                hidden[u] = value < 0 ? 0 : value; /* NaN stays NaN */
                total[u] = k ? total[u] + hidden[u] : hidden[u];
            }
        for (Index c = 0; c < channels; c++) z[c] = NAME(dot)(w2 + c * units, total, units) + pools * b2[c];
    }
}

/* Its gradients, which are 0 before: dtotal = w2' dz, dhidden = dtotal where hidden > 0, dd = w1' dhidden,
   dw1 = dhidden d', db1 = dhidden, dw2 = dz total', db2 = pools * dz, summed over images and pools.
   scratch: units of ACCUMULATED. */
void NAME(mlp_backward)(const ACCUMULATED *dz, const ACCUMULATED *d, const ACCUMULATED *hidden,
                        const ACCUMULATED *total, const ACCUMULATED *w1, const ACCUMULATED *w2, Index images,
                        Index pools, Index channels, Index units, ACCUMULATED *dd, ACCUMULATED *dw1, ACCUMULATED *db1,
                        ACCUMULATED *dw2, ACCUMULATED *db2, ACCUMULATED *scratch)
{
    for (Index n = 0; n < images; n++, dz += channels, total += units) {
        memset(scratch, 0, (size_t)units * sizeof *scratch);
        for (Index c = 0; c < channels; c++) {
            NAME(add_scaled)(scratch, dz[c], w2 + c * units, units);
            NAME(add_scaled)(dw2 + c * units, dz[c], total, units);
            db2[c] += pools * dz[c];
        }
        for (Index k = 0; k < pools; k++, d += channels, dd += channels, hidden += units)
            for (Index u = 0; u < units; u++) {
                if (hidden[u] <= 0) continue;
                db1[u] += scratch[u];
                NAME(add_scaled)(dw1 + u * channels, scratch[u], d, channels);
                NAME(add_scaled)(dd, scratch[u], w1 + u * channels, channels);
            }
    }
}
#endif

#undef TYPE
#undef STORED
#undef ACCUMULATED
#undef INTEGER
#undef BFLOAT16
#undef LANES
#undef Vector
#undef Mask
