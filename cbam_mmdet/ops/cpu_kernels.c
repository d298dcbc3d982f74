/* CBAM's passes over memory on a CPU: plain C with OpenMP, called from c_passes.py by ctypes.

   A tensor is (images, rows, columns) with its columns side by side in memory: channels by pixels where it is
   contiguous, pixels by channels where it is channels-last. So each function serves both layouts of a pass, or there
   is one for rows and one for columns. What a pass computes: passes.py.

   A tensor is cut into blocks by its shape alone. A block's sums are taken in one order, and blocks are added up in
   theirs, so results depend neither on the number of threads nor on the instructions that the compiler may use:
   vectors have 32 bytes everywhere, and no product is fused with a sum (-ffp-contract=off). */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#define TEXT_(name) #name
#define TEXT(name) TEXT_(name)

/* Of which sources this was built, as setup.py says. */
const char cbam_source[] = TEXT(CBAM_SOURCE);

#define INLINE static inline __attribute__((always_inline))
#define VECTOR __attribute__((vector_size(32)))

typedef int64_t Index;

enum {
    CHUNK = 512,          /* columns: a row's maximum is first looked for in chunks, then in the chunk that holds it */
    COLUMNS = 2048,        /* of a tile whose accumulators stay in the first-level cache */
    WIDE = 2048,          /* the same where rows are short: a whole row of up to so many columns */
    FOUR = 4,             /* rows that share an accumulator's load and store */
    ROWS = 16,            /* that share what is loaded for a tile's columns */
    LONGEST = 31,         /* side of a convolution's kernel */
    BLOCK = 1 << 14,      /* elements that a thread takes at a time from what needs no sums */
};

INLINE Index least(Index a, Index b) { return a < b ? a : b; }

INLINE Index ceiling(Index a, Index b) { return (a + b - 1) / b; }

/* Columns are cut into tiles where they are many: equal ones, eight or a multiple of it. */
INLINE Index tile_of(Index columns)
{
    if (columns <= WIDE) return columns;
    Index tiles = ceiling(ceiling(columns, COLUMNS), 8) * 8;
    return ceiling(ceiling(columns, tiles), 16) * 16;
}

/* Rows are cut into spans where columns are not, so that threads have something to share. */
INLINE Index span_of(Index rows, Index columns)
{
    if (columns > WIDE) return rows;
    return ceiling(rows, least(ceiling(rows * columns, 4 * BLOCK), least(ceiling(rows, 64), 64)));
}

/* The number of tiles and of spans: partial sums that a caller makes room for. */
Index cbam_tiles(Index columns) { return ceiling(columns, tile_of(columns)); }

Index cbam_spans(Index rows, Index columns) { return ceiling(rows, span_of(rows, columns)); }

/* The first touch of fresh memory costs more than the work, and a tenth of that in huge pages. */
void cbam_expect_writes(void *memory, Index bytes)
{
#ifdef MADV_HUGEPAGE
    madvise(memory, (size_t)bytes, MADV_HUGEPAGE); /* advice: where it fails nothing changes */
#else
    (void)memory, (void)bytes;
#endif
}

#define JOIN_(name, type) cbam_##name##_##type
#define JOIN(name, type) JOIN_(name, type)
#define NAME(name) JOIN(name, TYPE)

#define TYPE f32
#define STORED float
#define ACCUMULATED float
#define INTEGER int32_t
#include "cpu_kernels.h"

#define TYPE f64
#define STORED double
#define ACCUMULATED double
#define INTEGER int64_t
#include "cpu_kernels.h"

#define TYPE bf16
#define STORED uint16_t
#define ACCUMULATED float
#define INTEGER int32_t
#define BFLOAT16
#include "cpu_kernels.h"
