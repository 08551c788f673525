// A crop of a rescaled image in one pass: resampled rows first, then columns, flipped, a colour
// added. The bits are those of TensorFlow's ScaleAndTranslate with antialias=True, because
// every product is rounded before it is added (-ffp-contract=off) and sums run from zero in the
// order of the source pixels. Plain C against TensorFlow's C API: it compiles in a second.

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct TF_OpDefinitionBuilder TF_OpDefinitionBuilder;  // ops.h expects C++
typedef struct TF_ShapeInferenceContext TF_ShapeInferenceContext;
typedef struct TF_ShapeHandle TF_ShapeHandle;
typedef struct TF_DimensionHandle TF_DimensionHandle;
#include "tensorflow/c/kernels.h"
#include "tensorflow/c/ops.h"
#include "tensorflow/c/tf_tensor.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

enum { CHANNELS = 3 };
enum { PIXELS, BOX, SCALE, SHIFT, FLIP, RGB, INPUTS };
static const int64_t ELEMENTS[INPUTS] = {-1, 4, 2, 2, 1, 3};

typedef float Pixel __attribute__((vector_size(16)));  // three channels and one lane to spare

typedef struct {
  int32_t side;         // of the crop, pixels
  unsigned char cubic;  // Keys' cubic kernel, else the triangle
} Settings;

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

FOR_EACH_PROCESSOR
static void mix_rows(const uint8_t *rows, size_t pitch, int width, const float *weights, int count,
                     float *restrict mixed) {
  memset(mixed, 0, width * sizeof(float));
  int k = 0;
  for (; k + 1 < count; k += 2) {  // two at a time: half the traffic
    const uint8_t *one = rows + k * pitch, *two = one + pitch;
    const float a = weights[k], b = weights[k + 1];
    for (int i = 0; i < width; ++i) mixed[i] = (mixed[i] + a * one[i]) + b * two[i];
  }
  if (k < count)
    for (int i = 0; i < width; ++i) mixed[i] += weights[k] * rows[k * pitch + i];
}

// Four floats are stored for a pixel, of which the next pixel then overwrites the fourth. All
// take as many taps, the rest with weight zero: a count that varies is a mispredicted branch.
FOR_EACH_PROCESSOR
static void mix_columns(const float *row, const Taps *taps, int side, int flip, Pixel colour,
                        float *restrict out) {
  const int most = taps->most;
  for (int x = 0; x < side; ++x) {
    const int from = flip ? side - 1 - x : x;
    const float *source = row + (size_t)CHANNELS * taps->first[from];
    const float *weights = taps->weights + (size_t)from * taps->stride;
    Pixel sum = {0};
    for (int k = 0; k < most; ++k) {
      Pixel value;
      memcpy(&value, source + CHANNELS * k, sizeof value);
      sum += weights[k] * value;
    }
    sum += colour;
    memcpy(out + CHANNELS * x, &sum, x + 1 < side ? sizeof sum : CHANNELS * sizeof(float));
  }
}

static void resample(const Settings *settings, const void *const *data, int64_t columns, float *out,
                     TF_Status *status) {
  const int32_t *box = data[BOX];
  const float *scale = data[SCALE], *shift = data[SHIFT], *rgb = data[RGB];
  const int flip = *(const unsigned char *)data[FLIP], side = settings->side;
  const int width = CHANNELS * box[3];
  const size_t pitch = (size_t)CHANNELS * columns;
  const uint8_t *window = (const uint8_t *)data[PIXELS] + box[0] * pitch + CHANNELS * box[1];
  const Pixel colour = {rgb[0], rgb[1], rgb[2], 0.0f};
  Taps rows = {0}, across = {0};
  float *mixed = NULL;
  if (make_taps(&rows, settings, box[2], scale[0], shift[0]) &&
      make_taps(&across, settings, box[3], scale[1], shift[1]))
    mixed = calloc((size_t)width + CHANNELS * across.most + 1, sizeof(float));
  if (!mixed) TF_SetStatus(status, TF_RESOURCE_EXHAUSTED, "no memory left to resample an image");
  for (int y = 0; mixed && y < side; ++y) {
    mix_rows(window + rows.first[y] * pitch, pitch, width, rows.weights + (size_t)y * rows.stride,
             rows.count[y], mixed);
    mix_columns(mixed, &across, side, flip, colour, out + (size_t)CHANNELS * y * side);
  }
  free_taps(&rows);
  free_taps(&across);
  free(mixed);
}

static void read_inputs(TF_OpKernelContext *context, TF_Tensor **inputs, const void **data,
                        TF_Status *status) {
  for (int i = 0; i < INPUTS; ++i) {
    TF_GetInput(context, i, &inputs[i], status);
    if (TF_GetCode(status) != TF_OK) return;
    data[i] = TF_TensorData(inputs[i]);
    if (ELEMENTS[i] >= 0 && TF_TensorElementCount(inputs[i]) != ELEMENTS[i]) {
      TF_SetStatus(status, TF_INVALID_ARGUMENT, "an input has another size than the op takes");
      return;
    }
  }
  const TF_Tensor *pixels = inputs[PIXELS];
  const int32_t *box = data[BOX];
  if (TF_NumDims(pixels) != 3 || TF_Dim(pixels, 2) != CHANNELS)
    TF_SetStatus(status, TF_INVALID_ARGUMENT, "the image is not [height, width, 3]");
  else if (box[0] < 0 || box[1] < 0 || box[2] < 1 || box[3] < 1 ||
           (int64_t)box[0] + box[2] > TF_Dim(pixels, 0) ||
           (int64_t)box[1] + box[3] > TF_Dim(pixels, 1))
    TF_SetStatus(status, TF_INVALID_ARGUMENT, "the window is not inside the image");
}

static void compute(void *settings, TF_OpKernelContext *context) {
  const int64_t side = ((const Settings *)settings)->side, shape[] = {side, side, CHANNELS};
  TF_Status *status = TF_NewStatus();
  TF_Tensor *inputs[INPUTS] = {0}, *output = NULL;
  const void *data[INPUTS] = {0};
  read_inputs(context, inputs, data, status);
  if (TF_GetCode(status) == TF_OK)
    output = TF_AllocateOutput(context, 0, TF_FLOAT, shape, 3,
                               (size_t)(side * side) * CHANNELS * sizeof(float), status);
  if (TF_GetCode(status) == TF_OK)
    resample(settings, data, TF_Dim(inputs[PIXELS], 1), TF_TensorData(output), status);
  if (TF_GetCode(status) != TF_OK) TF_OpKernelContext_Failure(context, status);
  for (int i = 0; i < INPUTS; ++i)
    if (inputs[i]) TF_DeleteTensor(inputs[i]);
  if (output) TF_DeleteTensor(output);
  TF_DeleteStatus(status);
}

static void *create(TF_OpKernelConstruction *construction) {
  Settings *settings = calloc(1, sizeof *settings);
  TF_Status *status = TF_NewStatus();
  TF_OpKernelConstruction_GetAttrInt32(construction, "side", &settings->side, status);
  if (TF_GetCode(status) == TF_OK)
    TF_OpKernelConstruction_GetAttrBool(construction, "cubic", &settings->cubic, status);
  if (TF_GetCode(status) == TF_OK && settings->side < 1)
    TF_SetStatus(status, TF_INVALID_ARGUMENT, "the side of a crop is at least 1");
  if (TF_GetCode(status) != TF_OK) TF_OpKernelConstruction_Failure(construction, status);
  TF_DeleteStatus(status);
  return settings;
}

static void infer_shape(TF_ShapeInferenceContext *context, TF_Status *status) {
  TF_ShapeInferenceContextSetUnknownShape(context, status);
}

__attribute__((constructor)) static void register_op(void) {
  static const char *const INPUT_SPECS[INPUTS] = {"pixels: uint8", "box: int32",  "scale: float",
                                                  "shift: float",  "flip: bool", "rgb: float"};
  static const char NAME[] = "VggreproResampledCrop";
  TF_Status *status = TF_NewStatus();
  TF_OpDefinitionBuilder *op = TF_NewOpDefinitionBuilder(NAME);
  for (int i = 0; i < INPUTS; ++i) TF_OpDefinitionBuilderAddInput(op, INPUT_SPECS[i]);
  TF_OpDefinitionBuilderAddOutput(op, "crop: float");
  TF_OpDefinitionBuilderAddAttr(op, "side: int");
  TF_OpDefinitionBuilderAddAttr(op, "cubic: bool");
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, infer_shape);
  TF_RegisterOpDefinition(op, status);
  if (TF_GetCode(status) == TF_OK)
    TF_RegisterKernelBuilder(NAME, TF_NewKernelBuilder(NAME, "CPU", create, compute, free), status);
  TF_DeleteStatus(status);
}
