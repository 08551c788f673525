// TensorFlow ops: runs of consecutive records read from TFRecord files, and one of many records
// taken without a copy. A record is [length, 8 bytes; its checksum, 4; data; its checksum, 4],
// little-endian, the checksums CRC-32C, masked.
//
// A dataset for every record, the other way to start at an offset, costs more than the reading.
// Only where the processor computes the checksum.

#if defined(__x86_64__) && defined(__linux__)

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ops.h"
#include "tensorflow/c/tf_tstring.h"

enum { FILE_NAME, OFFSET, COUNT };
enum { RECORDS, PLACE };
enum { HEADER = 12, CHECKSUM = 4, STREAMS = 3, BLOCK = 4096 };

static const Argument READ_INPUTS[] = {
    {"files: string", 0}, {"offsets: int64", 0}, {"counts: int64", 0}, {NULL, 0}};
static const Argument TAKE_INPUTS[] = {{"records: string", 0}, {"place: int64", 1}, {NULL, 0}};

static const uint32_t POLYNOMIAL = 0x82f63b78;  // of CRC-32C, lowest power in the highest bit
static uint32_t past_block, past_two;           // x to the power of 8 * BLOCK, and twice that

// The product of two polynomials modulo POLYNOMIAL.
static uint32_t product(uint32_t a, uint32_t b) {
  uint32_t sum = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
    if (a & bit) sum ^= b;
    b = b & 1 ? b >> 1 ^ POLYNOMIAL : b >> 1;
  }
  return sum;
}

static uint64_t word(const unsigned char *data) {
  uint64_t value;
  memcpy(&value, data, sizeof value);
  return value;
}

// Three blocks at a time: the instruction takes three cycles, but one can start in each.
__attribute__((target("sse4.2"))) static uint32_t checksum(const unsigned char *data,
                                                           size_t size) {
  uint64_t sum = 0xffffffff;
  for (; size >= STREAMS * BLOCK; size -= STREAMS * BLOCK, data += STREAMS * BLOCK) {
    uint64_t second = 0, third = 0;
    for (const unsigned char *at = data; at < data + BLOCK; at += sizeof(uint64_t)) {
      sum = __builtin_ia32_crc32di(sum, word(at));
      second = __builtin_ia32_crc32di(second, word(at + BLOCK));
      third = __builtin_ia32_crc32di(third, word(at + 2 * BLOCK));
    }
    sum = product(sum, past_two) ^ product(second, past_block) ^ third;
  }
  for (; size >= sizeof(uint64_t); size -= sizeof(uint64_t), data += sizeof(uint64_t))
    sum = __builtin_ia32_crc32di(sum, word(data));
  for (; size; --size) sum = __builtin_ia32_crc32qi(sum, *data++);
  const uint32_t crc = ~(uint32_t)sum;
  return (crc >> 15 | crc << 17) + 0xa282ead8;  // the mask of the format
}

static int matches(const unsigned char *data, size_t size) {
  uint32_t stored;
  memcpy(&stored, data + size, sizeof stored);
  return stored == checksum(data, size);
}

// What kept `size` bytes from being read, else NULL.
static const char *read_whole(int descriptor, void *to, size_t size, int64_t offset) {
  for (char *at = to; size;) {
    const ssize_t got = pread(descriptor, at, size, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return strerror(errno);
    if (got == 0) return "the file ends before its end";
    at += got, offset += got, size -= got;
  }
  return NULL;
}

// What is wrong with the record at `*offset`, else NULL; moves on to the next record.
static const char *read_record(int descriptor, int64_t *offset, int64_t file_size,
                               TF_TString *record) {
  unsigned char header[HEADER];
  uint64_t size;
  const char *fault = read_whole(descriptor, header, HEADER, *offset);
  if (fault) return fault;
  if (!matches(header, sizeof size)) return "its length is damaged";
  memcpy(&size, header, sizeof size);
  *offset += HEADER;
  if (size > (uint64_t)(file_size - *offset)) return "the file ends before its end";
  char *data = TF_TString_ResizeUninitialized(record, size + CHECKSUM);
  if ((fault = read_whole(descriptor, data, size + CHECKSUM, *offset))) return fault;
  if (!matches((unsigned char *)data, size)) return "its data is damaged";
  TF_TString_ResizeUninitialized(record, size);
  *offset += size + CHECKSUM;
  return NULL;
}

static void read_run(int descriptor, Call *call, const char *name, int64_t offset, int64_t count,
                     TF_TString *records) {
  const int64_t file_size = lseek(descriptor, 0, SEEK_END);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = offset;
    const char *fault = read_record(descriptor, &offset, file_size, &records[i]);
    if (!fault) continue;
    char message[512];
    snprintf(message, sizeof message, "record at byte %lld: %s: %s", (long long)start, fault, name);
    TF_SetStatus(call->status, TF_DATA_LOSS, message);
    return;
  }
}

static void open_and_read(Call *call, const TF_TString *file, int64_t offset, int64_t count,
                          TF_TString *records) {
  char *name = strndup(TF_TString_GetDataPointer(file), TF_TString_GetSize(file));
  const int descriptor = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
  if (descriptor < 0) {
    TF_SetStatusFromIOError(call->status, errno, name ? name : "");
  } else {
    read_run(descriptor, call, name, offset, count, records);
    close(descriptor);
  }
  free(name);
}

static void compute_read(void *settings, TF_OpKernelContext *context) {
  (void)settings;
  Call call = begin(context, READ_INPUTS);
  if (fine(&call)) {
    const TF_TString *files = call.data[FILE_NAME];
    const int64_t *offsets = call.data[OFFSET], *counts = call.data[COUNT];
    const int64_t runs = TF_TensorElementCount(call.inputs[FILE_NAME]);
    const int rank = TF_NumDims(call.inputs[FILE_NAME]) ? 1 : 0;  // 0: one record, a scalar
    int64_t total = 0;
    if (TF_TensorElementCount(call.inputs[OFFSET]) != runs ||
        TF_TensorElementCount(call.inputs[COUNT]) != runs)
      TF_SetStatus(call.status, TF_INVALID_ARGUMENT, "not as many files, offsets and counts");
    for (int64_t i = 0; fine(&call) && i < runs; ++i) {
      if (counts[i] < 0 || __builtin_add_overflow(total, counts[i], &total))
        TF_SetStatus(call.status, TF_INVALID_ARGUMENT, "no such number of records");
    }
    if (!rank && total != 1) TF_SetStatus(call.status, TF_INVALID_ARGUMENT, "not one record");
    TF_TString *records = new_output(&call, 0, TF_STRING, &total, rank);
    for (int64_t i = 0; records && fine(&call) && i < runs; records += counts[i++])
      open_and_read(&call, &files[i], offsets[i], counts[i], records);
  }
  end(&call);
}

// Moves a record out of its input, which is left without it unless it is a few bytes: nobody else
// may ask for the same.
static void compute_take(void *settings, TF_OpKernelContext *context) {
  (void)settings;
  Call call = begin(context, TAKE_INPUTS);
  if (fine(&call)) {
    const int64_t place = *(const int64_t *)call.data[PLACE];
    if (place < 0 || place >= TF_TensorElementCount(call.inputs[RECORDS]))
      TF_SetStatus(call.status, TF_INVALID_ARGUMENT, "the window has no such record");
    TF_TString *record = new_output(&call, 0, TF_STRING, NULL, 0);
    if (record) TF_TString_Move(record, (TF_TString *)call.data[RECORDS] + place);
  }
  end(&call);
}

__attribute__((constructor)) static void register_records(void) {
  if (!__builtin_cpu_supports("sse4.2")) return;
  past_block = 1u << 31;  // x to the power of 0
  for (int bit = 0; bit < 8 * BLOCK; ++bit)
    past_block = past_block & 1 ? past_block >> 1 ^ POLYNOMIAL : past_block >> 1;
  past_two = product(past_block, past_block);
  register_op(&(Op){.name = "VggreproReadRecords",
                    .inputs = READ_INPUTS,
                    .outputs = (const char *[]){"records: string", NULL},
                    .compute = compute_read});
  register_op(&(Op){.name = "VggreproTakeRecord",
                    .inputs = TAKE_INPUTS,
                    .outputs = (const char *[]){"record: string", NULL},
                    .compute = compute_take});
}

#endif
