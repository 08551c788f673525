// TensorFlow ops: the window of an image that a crop of the rescaled image reaches, and the crop
// made of it, in one pass: resampled rows first, then columns, flipped, a colour added. Also
// into its place in a batch, which spares a copy.
//
// The bits are those of vggrepro/resampling.py and of TensorFlow's ScaleAndTranslate with
// antialias=True, because every product is rounded before it is added (-ffp-contract=off) and
// sums run from zero in the order of the source pixels. Plain C against TensorFlow's C API: it
// compiles in a second.

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ops.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

#define UNROLLED inline __attribute__((always_inline))

enum { CHANNELS = 3 };
enum { SHAPE, SIDE, CORNER };
enum { PIXELS, BOX, SCALE, SHIFT, FLIP, RGB, IMAGES, WRITTEN, ROW };

#define CROP_INPUTS                                                                   \
  {"pixels: uint8", 0}, {"box: int32", 0}, {"scale: float", 0}, {"shift: float", 0}, \
      {"flip: bool", 0}, {"rgb: float", 0}

static const Argument WINDOW[] = {
    {"shape: int32", 3}, {"shorter_side: float", 1}, {"corner: float", 2}, {NULL, 0}};
static const Argument CROP[] = {CROP_INPUTS, {NULL, 0}};
static const Argument CROP_INTO[] = {
    CROP_INPUTS, {"images: float", 0}, {"written: int64", 1}, {"row: int64", 1}, {NULL, 0}};
static const Argument NEW_IMAGES[] = {{"like: int64", 0}, {NULL, 0}};

typedef float Pixel __attribute__((vector_size(16)));  // three channels and one lane to spare

typedef struct {
  int32_t side;         // of the crop, pixels
  unsigned char cubic;  // Keys' cubic kernel, else the triangle
  float margin;         // of the window around what the kernel reaches, source pixels
} Settings;

// One crop: its window in the pixels, and what is done with it.
typedef struct {
  const int32_t *box;         // first row and column, their numbers
  const float *scale, *shift;  // of rows, of columns
  const unsigned char *flip;
  const float *rgb;
} Form;

// Source pixels of each output pixel: `count[i]` from `first[i]` on, `stride` weights for each.
typedef struct {
  int *first, *count;
  float *weights;
  int stride, most;  // most: the largest count
} Taps;

static float kernel(int cubic, float x) {
  x = fabsf(x);
  if (!cubic) return x < 1.0f ? 1.0f - x : 0.0f;
  if (x >= 2.0f) return 0.0f;
  if (x >= 1.0f) return ((-0.5f * x + 2.5f) * x - 4.0f) * x + 2.0f;
  return ((1.5f * x - 2.5f) * x) * x + 1.0f;
}

static int inside(float position, int length) {
  return position < 0.0f ? 0 : position > length - 1 ? length - 1 : (int)position;
}

// Normalised weights of output pixel i; those of a pixel outside the image stay zero.
static void fill_taps(Taps *taps, int i, int cubic, int source, float centre, float widened) {
  const float reach = (cubic ? 2.0f : 1.0f) * widened, narrowing = 1.0f / widened;
  if (centre < 0.0f || centre > source) return;
  const int first = inside(ceilf(centre - reach - 0.5f), source);
  int count = inside(floorf(centre + reach - 0.5f), source) + 1 - first;
  if (count > taps->stride) count = taps->stride;
  float *weights = taps->weights + (size_t)i * taps->stride, total = 0.0f;
  for (int k = 0; k < count; ++k) {
    weights[k] = kernel(cubic, ((float)(first + k) + 0.5f - centre) * narrowing);
    total += weights[k];
  }
  const float factor = fabsf(total) < 1000.0f * FLT_MIN ? 0.0f : 1.0f / total;
  for (int k = 0; k < count; ++k) weights[k] *= factor;
  taps->first[i] = first;
  taps->count[i] = count;
  if (count > taps->most) taps->most = count;
}

// Whether there was memory. Source position = (output position - shift) / scale.
static int make_taps(Taps *taps, const Settings *settings, int source, float scale, float shift) {
  const float inverse = 1.0f / scale, offset = -inverse * shift;
  const float widened = inverse > 1.0f ? inverse : 1.0f;
  const int reached = 2 * (int)ceilf((settings->cubic ? 2.0f : 1.0f) * widened) + 1;
  taps->stride = reached < source ? reached : source;
  taps->first = calloc(settings->side, sizeof(int));
  taps->count = calloc(settings->side, sizeof(int));
  taps->weights = calloc((size_t)settings->side * taps->stride, sizeof(float));
  if (!taps->first || !taps->count || !taps->weights) return 0;
  for (int i = 0; i < settings->side; ++i)
    fill_taps(taps, i, settings->cubic, source, (i + 0.5f) * inverse + offset, widened);
  return 1;
}

static void free_taps(Taps *taps) {
  free(taps->first);
  free(taps->count);
  free(taps->weights);
}

// Once for each number of taps that is known when compiling: unrolled, it is half as fast again.
static UNROLLED void add_rows(const uint8_t *rows, size_t pitch, int width, const float *weights,
                              const int count, const int first, float *restrict mixed) {
  for (int i = 0; i < width; ++i) {
    float sum = first ? 0.0f : mixed[i];
    for (int k = 0; k < count; ++k) sum += weights[k] * rows[k * pitch + i];
    mixed[i] = sum;
  }
}

FOR_EACH_PROCESSOR
static void mix_rows(const uint8_t *rows, size_t pitch, int width, const float *weights, int count,
                     float *restrict mixed) {
  switch (count) {
    case 1: return add_rows(rows, pitch, width, weights, 1, 1, mixed);
    case 2: return add_rows(rows, pitch, width, weights, 2, 1, mixed);
    case 3: return add_rows(rows, pitch, width, weights, 3, 1, mixed);
    case 4: return add_rows(rows, pitch, width, weights, 4, 1, mixed);
  }
  memset(mixed, 0, width * sizeof(float));
  int k = 0;
  for (; k + 4 <= count; k += 4)
    add_rows(rows + k * pitch, pitch, width, weights + k, 4, 0, mixed);
  for (; k < count; ++k) add_rows(rows + k * pitch, pitch, width, weights + k, 1, 0, mixed);
}

static UNROLLED Pixel mixed_pixel(const float *source, const float *weights, const int count,
                                  Pixel colour) {
  Pixel sum = {0};
  for (int k = 0; k < count; ++k) {
    Pixel value;
    memcpy(&value, source + CHANNELS * k, sizeof value);
    sum += weights[k] * value;
  }
  return sum + colour;
}

// Four floats are stored for a pixel, of which the next pixel then overwrites the fourth. All
// take as many taps, the rest with weight zero: a count that varies is a mispredicted branch.
static UNROLLED void mix_pixels(const float *row, const Taps *taps, int side, int flip,
                                const int most, Pixel colour, float *restrict out) {
  const int *first = taps->first + (flip ? side - 1 : 0);
  const float *weights = taps->weights + (first - taps->first) * taps->stride;
  const int step = flip ? -1 : 1, stride = step * taps->stride;
  Pixel sum;
  for (int x = 0; x < side; ++x, first += step, weights += stride, out += CHANNELS) {
    sum = mixed_pixel(row + (size_t)CHANNELS * *first, weights, most, colour);
    if (x + 1 < side) memcpy(out, &sum, sizeof sum);
  }
  memcpy(out - CHANNELS, &sum, CHANNELS * sizeof(float));
}

FOR_EACH_PROCESSOR
static void mix_columns(const float *row, const Taps *taps, int side, int flip, Pixel colour,
                        float *restrict out) {
  switch (taps->most) {
    case 2: return mix_pixels(row, taps, side, flip, 2, colour, out);
    case 3: return mix_pixels(row, taps, side, flip, 3, colour, out);
    case 4: return mix_pixels(row, taps, side, flip, 4, colour, out);
    default: return mix_pixels(row, taps, side, flip, taps->most, colour, out);
  }
}

static void resample(const Settings *settings, const Call *call, const Form *form, float *out) {
  const int side = settings->side, width = CHANNELS * form->box[3];
  const size_t pitch = (size_t)CHANNELS * TF_Dim(call->inputs[PIXELS], 1);
  const uint8_t *window =
      (const uint8_t *)call->data[PIXELS] + form->box[0] * pitch + CHANNELS * form->box[1];
  const Pixel colour = {form->rgb[0], form->rgb[1], form->rgb[2], 0.0f};
  Taps rows = {0}, across = {0};
  float *mixed = NULL;
  if (make_taps(&rows, settings, form->box[2], form->scale[0], form->shift[0]) &&
      make_taps(&across, settings, form->box[3], form->scale[1], form->shift[1]))
    mixed = calloc((size_t)width + CHANNELS * across.most + 1, sizeof(float));
  if (!mixed)
    TF_SetStatus(call->status, TF_RESOURCE_EXHAUSTED, "no memory left to resample an image");
  for (int y = 0; mixed && y < side; ++y) {
    mix_rows(window + rows.first[y] * pitch, pitch, width, rows.weights + (size_t)y * rows.stride,
             rows.count[y], mixed);
    mix_columns(mixed, &across, side, *form->flip, colour, out + (size_t)CHANNELS * y * side);
  }
  free_taps(&rows);
  free_taps(&across);
  free(mixed);
}

// Of an input that has `elements` for an image, or for each of several, those of image `row`.
static const void *of_row(const Call *call, int input, int elements, int64_t row, int64_t rows) {
  const int64_t found = TF_TensorElementCount(call->inputs[input]);
  const size_t bytes = elements * TF_DataTypeSize(TF_TensorType(call->inputs[input]));
  if (found == elements) return call->data[input];
  if (found == rows * elements) return (const char *)call->data[input] + row * bytes;
  TF_SetStatus(call->status, TF_INVALID_ARGUMENT, "an input has another size than the op takes");
  return call->data[input];
}

// The form of image `row` of `rows`, if the inputs that both crops have fit together.
static Form form_of(const Call *call, int64_t row, int64_t rows) {
  Form form = {0};
  if (!fine(call)) return form;
  form.box = of_row(call, BOX, 4, row, rows);
  form.scale = of_row(call, SCALE, 2, row, rows);
  form.shift = of_row(call, SHIFT, 2, row, rows);
  form.flip = of_row(call, FLIP, 1, row, rows);
  form.rgb = of_row(call, RGB, 3, row, rows);
  const TF_Tensor *pixels = call->inputs[PIXELS];
  if (!fine(call)) return form;
  const int32_t *box = form.box;
  if (TF_NumDims(pixels) != 3 || TF_Dim(pixels, 2) != CHANNELS)
    TF_SetStatus(call->status, TF_INVALID_ARGUMENT, "the image is not [height, width, 3]");
  else if (box[0] < 0 || box[1] < 0 || box[2] < 1 || box[3] < 1 ||
           (int64_t)box[0] + box[2] > TF_Dim(pixels, 0) ||
           (int64_t)box[1] + box[3] > TF_Dim(pixels, 1))
    TF_SetStatus(call->status, TF_INVALID_ARGUMENT, "the window is not inside the image");
  return form;
}

static void compute_crop(void *settings, TF_OpKernelContext *context) {
  const int64_t side = ((const Settings *)settings)->side;
  Call call = begin(context, CROP);
  const Form form = form_of(&call, 0, 1);
  float *out = new_output(&call, 0, TF_FLOAT, (int64_t[]){side, side, CHANNELS}, 3);
  if (out) resample(settings, &call, &form, out);
  end(&call);
}

static void compute_new_images(void *settings, TF_OpKernelContext *context) {
  const int64_t side = ((const Settings *)settings)->side;
  Call call = begin(context, NEW_IMAGES);
  const int64_t count = fine(&call) ? TF_TensorElementCount(call.inputs[0]) : 0;
  new_output(&call, 0, TF_FLOAT, (int64_t[]){count, side, side, CHANNELS}, 4);
  int64_t *written = new_output(&call, 1, TF_INT64, NULL, 0);
  if (written) *written = 0;
  end(&call);
}

// The place of `row` in a batch; NULL: it has none.
static float *row_of(const Call *call, int64_t side, int64_t row) {
  const TF_Tensor *images = call->inputs[IMAGES];
  if (!fine(call)) return NULL;
  if (TF_NumDims(images) != 4 || TF_Dim(images, 1) != side || TF_Dim(images, 2) != side ||
      TF_Dim(images, 3) != CHANNELS)
    TF_SetStatus(call->status, TF_INVALID_ARGUMENT, "the batch is not [rows, side, side, 3]");
  else if (row < 0 || row >= TF_Dim(images, 0))
    TF_SetStatus(call->status, TF_INVALID_ARGUMENT, "the batch has no such row");
  return fine(call) ? (float *)TF_TensorData(images) + row * side * side * CHANNELS : NULL;
}

// Writes into its input, and counts what is written: nobody else may look at that row before, nor
// write to it.
static void compute_crop_into(void *settings, TF_OpKernelContext *context) {
  const int64_t side = ((const Settings *)settings)->side;
  Call call = begin(context, CROP_INTO);
  const int64_t row = fine(&call) ? *(const int64_t *)call.data[ROW] : 0;
  float *out = row_of(&call, side, row);
  if (out) {
    const Form form = form_of(&call, row, TF_Dim(call.inputs[IMAGES], 0));
    if (fine(&call)) resample(settings, &call, &form, out);
    if (fine(&call)) __atomic_fetch_add((int64_t *)call.data[WRITTEN], 1, __ATOMIC_RELEASE);
    if (fine(&call)) TF_SetOutput(context, 0, call.inputs[IMAGES], call.status);
  }
  end(&call);
}

static void compute_window(void *settings_, TF_OpKernelContext *context) {
  const Settings *settings = settings_;
  Call call = begin(context, WINDOW);
  int32_t *box = new_output(&call, 0, TF_INT32, (int64_t[]){4}, 1);
  float *scale = new_output(&call, 1, TF_FLOAT, (int64_t[]){2}, 1);
  float *shift = new_output(&call, 2, TF_FLOAT, (int64_t[]){2}, 1);
  if (shift) {
    const int32_t *shape = call.data[SHAPE];
    const float shorter_side = *(const float *)call.data[SIDE], *place = call.data[CORNER];
    const float shortest = shape[0] < shape[1] ? shape[0] : shape[1];
    for (int i = 0; i < 2; ++i) {  // rows, columns
      const float size = shape[i], rescaled = rintf(size * shorter_side / shortest);
      scale[i] = rescaled / size;
      const float corner = floorf(place[i] * (rescaled - (settings->side - 1.0f)));
      const float widened = fmaxf(1.0f / scale[i], 1.0f);
      const float reach = (settings->cubic ? 2.0f : 1.0f) * widened + settings->margin;
      const float first = fmaxf(floorf(corner / scale[i] - reach), 0.0f);
      const float end = fminf(ceilf((corner + settings->side) / scale[i] + reach), size);
      box[i] = (int32_t)first;
      box[2 + i] = (int32_t)(end - first);
      shift[i] = first * scale[i] - corner;
    }
  }
  end(&call);
}

static void *create(TF_OpKernelConstruction *construction) {
  Settings *settings = calloc(1, sizeof *settings);
  TF_Status *status = TF_NewStatus();
  TF_OpKernelConstruction_GetAttrInt32(construction, "side", &settings->side, status);
  if (TF_GetCode(status) == TF_OK)
    TF_OpKernelConstruction_GetAttrBool(construction, "cubic", &settings->cubic, status);
  if (TF_GetCode(status) == TF_OK)
    TF_OpKernelConstruction_GetAttrFloat(construction, "margin", &settings->margin, status);
  if (TF_GetCode(status) == TF_OK && settings->side < 1)
    TF_SetStatus(status, TF_INVALID_ARGUMENT, "the side of a crop is at least 1");
  if (TF_GetCode(status) != TF_OK) TF_OpKernelConstruction_Failure(construction, status);
  TF_DeleteStatus(status);
  return settings;
}

static const char *const FORM[] = {"side: int", "cubic: bool = false", "margin: float = 0", NULL};

static void register_form(const char *name, const Argument *inputs, const char *const *outputs,
                          void (*compute)(void *, TF_OpKernelContext *)) {
  register_op(&(Op){name, inputs, outputs, FORM, create, compute});
}

__attribute__((constructor)) static void register_crops(void) {
  register_form("VggreproCropWindow", WINDOW,
                (const char *[]){"box: int32", "scale: float", "shift: float", NULL},
                compute_window);
  register_form("VggreproResampledCrop", CROP, (const char *[]){"crop: float", NULL},
                compute_crop);
  // Not stateful: op determinism would make a pipeline with state serial. So nothing keeps
  // TensorFlow from folding constants: what these two take must not be constant.
  register_form("VggreproNewImages", NEW_IMAGES,
                (const char *[]){"images: float", "written: int64", NULL}, compute_new_images);
  register_form("VggreproCropInto", CROP_INTO, (const char *[]){"cropped: float", NULL},
                compute_crop_into);
}
