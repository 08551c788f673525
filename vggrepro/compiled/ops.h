// What the ops have in common: TensorFlow's C API, inputs, outputs and registration. One
// translation unit, library.c: TensorFlow's headers define constants, which link only once in C.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct TF_OpDefinitionBuilder TF_OpDefinitionBuilder;  // ops.h expects C++
typedef struct TF_ShapeInferenceContext TF_ShapeInferenceContext;
typedef struct TF_ShapeHandle TF_ShapeHandle;
typedef struct TF_DimensionHandle TF_DimensionHandle;
#include "tensorflow/c/kernels.h"
#include "tensorflow/c/ops.h"
#include "tensorflow/c/tf_tensor.h"

enum { MOST_ARGUMENTS = 9 };

// An input: its specification, and its elements (0: any number).
typedef struct {
  const char *spec;
  int64_t elements;
} Argument;

typedef struct {
  const char *name;
  const Argument *inputs;          // ends with one that has no specification
  const char *const *outputs;      // ends with NULL
  const char *const *attributes;   // likewise; NULL: none
  void *(*create)(TF_OpKernelConstruction *);  // NULL: the op has no settings
  void (*compute)(void *settings, TF_OpKernelContext *);
} Op;

// One run of an op. `data` points to the elements of the inputs.
typedef struct {
  TF_OpKernelContext *context;
  TF_Status *status;
  TF_Tensor *inputs[MOST_ARGUMENTS], *outputs[MOST_ARGUMENTS];
  const void *data[MOST_ARGUMENTS];
} Call;

// Whether nothing has failed.
static int fine(const Call *call) { return TF_GetCode(call->status) == TF_OK; }

// Reads the inputs; a wrong number of elements is an error.
static Call begin(TF_OpKernelContext *context, const Argument *inputs) {
  Call call = {.context = context, .status = TF_NewStatus()};
  for (int i = 0; inputs[i].spec && fine(&call); ++i) {
    TF_GetInput(context, i, &call.inputs[i], call.status);
    if (!fine(&call)) break;
    call.data[i] = TF_TensorData(call.inputs[i]);
    if (inputs[i].elements && TF_TensorElementCount(call.inputs[i]) != inputs[i].elements)
      TF_SetStatus(call.status, TF_INVALID_ARGUMENT,
                   "an input has another size than the op takes");
  }
  return call;
}

// The elements of a new output; NULL: something has failed.
static void *new_output(Call *call, int number, TF_DataType type, const int64_t *shape, int rank) {
  size_t bytes = TF_DataTypeSize(type);
  if (!fine(call)) return NULL;
  for (int i = 0; i < rank; ++i) bytes *= shape[i];
  call->outputs[number] =
      TF_AllocateOutput(call->context, number, type, shape, rank, bytes, call->status);
  return fine(call) ? TF_TensorData(call->outputs[number]) : NULL;
}

// Reports a failure, if any, and lets go of inputs and outputs.
static void end(Call *call) {
  if (!fine(call)) TF_OpKernelContext_Failure(call->context, call->status);
  for (int i = 0; i < MOST_ARGUMENTS; ++i) {
    if (call->inputs[i]) TF_DeleteTensor(call->inputs[i]);
    if (call->outputs[i]) TF_DeleteTensor(call->outputs[i]);
  }
  TF_DeleteStatus(call->status);
}

static void infer_shape(TF_ShapeInferenceContext *context, TF_Status *status) {
  TF_ShapeInferenceContextSetUnknownShape(context, status);
}

// Registers an op and its kernel on the CPU.
static void register_op(const Op *op) {
  TF_Status *status = TF_NewStatus();
  TF_OpDefinitionBuilder *builder = TF_NewOpDefinitionBuilder(op->name);
  for (const Argument *input = op->inputs; input->spec; ++input)
    TF_OpDefinitionBuilderAddInput(builder, input->spec);
  for (const char *const *output = op->outputs; *output; ++output)
    TF_OpDefinitionBuilderAddOutput(builder, *output);
  for (const char *const *attribute = op->attributes; attribute && *attribute; ++attribute)
    TF_OpDefinitionBuilderAddAttr(builder, *attribute);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(builder, infer_shape);
  TF_RegisterOpDefinition(builder, status);
  if (TF_GetCode(status) == TF_OK)
    TF_RegisterKernelBuilder(
        op->name, TF_NewKernelBuilder(op->name, "CPU", op->create, op->compute, free), status);
  TF_DeleteStatus(status);
}
