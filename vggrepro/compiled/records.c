// TensorFlow ops: a record read from a local TFRecord file, and many to be read soon. A record is
// [length, 8 bytes; its checksum, 4; data; its checksum, 4], little-endian, the checksums CRC-32C,
// masked.
//
// A dataset for every record, the other way to start at an offset, costs more than the reading.
// Only where the processor computes the checksum.

#if defined(__x86_64__) && defined(__linux__)

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ops.h"
#include "tensorflow/c/tf_tstring.h"

enum { FILES, OFFSETS, NUMBER, ENDS = 2, SAME };
enum { HEADER = 12, CHECKSUM = 4, STREAMS = 3, BLOCK = 4096 };
enum { ADVISED = 128 << 10 };  // bytes at a time: Linux cuts a longer one off, by default here

static const Argument READ_INPUTS[] = {
    {"files: string", 0}, {"offsets: int64", 0}, {"number: int64", 1}, {NULL, 0}};
static const Argument AHEAD_INPUTS[] = {
    {"files: string", 0}, {"offsets: int64", 0}, {"ends: int64", 0}, {"same: int64", 0}, {NULL, 0}};

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

// What is wrong with the record at `offset`, else NULL.
static const char *read_record(int descriptor, int64_t offset, TF_TString *record) {
  const int64_t file_size = lseek(descriptor, 0, SEEK_END);
  unsigned char header[HEADER];
  uint64_t size;
  const char *fault = read_whole(descriptor, header, HEADER, offset);
  if (fault) return fault;
  if (!matches(header, sizeof size)) return "its length is damaged";
  memcpy(&size, header, sizeof size);
  offset += HEADER;
  if (size > (uint64_t)(file_size - offset)) return "the file ends before its end";
  char *data = TF_TString_ResizeUninitialized(record, size + CHECKSUM);
  if ((fault = read_whole(descriptor, data, size + CHECKSUM, offset))) return fault;
  if (!matches((unsigned char *)data, size)) return "its data is damaged";
  TF_TString_ResizeUninitialized(record, size);
  return NULL;
}

// A descriptor, or -1; `name` must be freed.
static int open_file(const TF_TString *file, char **name) {
  *name = strndup(TF_TString_GetDataPointer(file), TF_TString_GetSize(file));
  return *name ? open(*name, O_RDONLY | O_CLOEXEC) : -1;
}

static void compute_read(void *settings, TF_OpKernelContext *context) {
  (void)settings;
  Call call = begin(context, READ_INPUTS);
  const int64_t number = fine(&call) ? *(const int64_t *)call.data[NUMBER] : 0;
  if (fine(&call) && (number < 0 || number >= TF_TensorElementCount(call.inputs[FILES]) ||
                      number >= TF_TensorElementCount(call.inputs[OFFSETS])))
    TF_SetStatus(call.status, TF_INVALID_ARGUMENT, "there is no record of that number");
  TF_TString *record = new_output(&call, 0, TF_STRING, NULL, 0);
  if (record) {
    char *name;
    const int64_t offset = ((const int64_t *)call.data[OFFSETS])[number];
    const int descriptor = open_file((const TF_TString *)call.data[FILES] + number, &name);
    if (descriptor < 0) TF_SetStatusFromIOError(call.status, errno, name ? name : "");
    const char *fault = descriptor < 0 ? NULL : read_record(descriptor, offset, record);
    if (fault) {
      char message[512];
      snprintf(message, sizeof message, "record at byte %lld: %s: %s", (long long)offset, fault,
               name);
      TF_SetStatus(call.status, TF_DATA_LOSS, message);
    }
    if (descriptor >= 0) close(descriptor);
    free(name);
  }
  end(&call);
}

static int equal(const TF_TString *a, const TF_TString *b) {
  const size_t size = TF_TString_GetSize(a);
  return size == TF_TString_GetSize(b) &&
         !memcmp(TF_TString_GetDataPointer(a), TF_TString_GetDataPointer(b), size);
}

// Has the kernel read bytes into its page cache, and does not wait for them.
static void advise(int descriptor, int64_t offset, int64_t end) {
  struct stat known;
  if (fstat(descriptor, &known) || !S_ISREG(known.st_mode)) return;  // a directory has any size
  if (end > known.st_size) end = known.st_size;
  for (; offset < end; offset += ADVISED)
    posix_fadvise(descriptor, offset, end - offset < ADVISED ? end - offset : ADVISED,
                  POSIX_FADV_WILLNEED);
}

// An advice only: whoever then reads says what is wrong with a file.
static void compute_ahead(void *settings, TF_OpKernelContext *context) {
  (void)settings;
  Call call = begin(context, AHEAD_INPUTS);
  const int64_t count = fine(&call) ? TF_TensorElementCount(call.inputs[FILES]) : 0;
  if (fine(&call) && (TF_TensorElementCount(call.inputs[OFFSETS]) != count ||
                      TF_TensorElementCount(call.inputs[ENDS]) != count))
    TF_SetStatus(call.status, TF_INVALID_ARGUMENT, "not as many files, offsets and ends");
  const TF_TString *files = call.data[FILES];
  const int64_t *offsets = call.data[OFFSETS], *ends = call.data[ENDS];
  for (int64_t i = 0, next; fine(&call) && i < count; i = next) {
    next = i + 1;
    while (next < count && offsets[next] == ends[next - 1] && equal(&files[next], &files[i])) ++next;
    char *name;
    const int descriptor = open_file(&files[i], &name);
    if (descriptor >= 0) {
      advise(descriptor, offsets[i], ends[next - 1]);
      close(descriptor);
    }
    free(name);
  }
  if (fine(&call)) TF_SetOutput(context, 0, call.inputs[SAME], call.status);
  end(&call);
}

__attribute__((constructor)) static void register_records(void) {
  if (!__builtin_cpu_supports("sse4.2")) return;
  past_block = 1u << 31;  // x to the power of 0
  for (int bit = 0; bit < 8 * BLOCK; ++bit)
    past_block = past_block & 1 ? past_block >> 1 ^ POLYNOMIAL : past_block >> 1;
  past_two = product(past_block, past_block);
  register_op(&(Op){.name = "VggreproReadRecord",
                    .inputs = READ_INPUTS,
                    .outputs = (const char *[]){"record: string", NULL},
                    .compute = compute_read});
  register_op(&(Op){.name = "VggreproReadAhead",
                    .inputs = AHEAD_INPUTS,
                    .outputs = (const char *[]){"passed: int64", NULL},
                    .compute = compute_ahead});
}

#endif
