// Sizes and offsets of what a step's kernel is handed, a line each: "struct member offset size".
#include <cstdio>

#include "cuda/step.h"

#define SHOW(type, member) \
    printf(#type " " #member " %zu %zu\n", offsetof(headrace::type, member), sizeof(headrace::type::member));
#define SHOW_ALL(type) printf(#type " sizeof 0 %zu\n", sizeof(headrace::type));

int main() {
    SHOW_ALL(Failure)
    SHOW_ALL(MultiStepArguments)
    SHOW_ALL(StepArguments)
    MEMBERS
    printf("RowFlag WANTS_LOGITS %d 0\n", headrace::kWantsLogits);
    printf("RowFlag WANTS_REDUCTIONS %d 0\n", headrace::kWantsReductions);
    printf("RowFlag IS_RESTRICTED %d 0\n", headrace::kIsRestricted);
    printf("FailureCode NONE %d 0\n", headrace::kNoFailure);
    printf("FailureCode COUNTER_WAIT %d 0\n", headrace::kCounterWait);
    printf("FailureCode WEIGHTS_WAIT %d 0\n", headrace::kWeightsWait);
    printf("FailureCode PROGRESS_WAIT %d 0\n", headrace::kProgressWait);
    printf("FailureCode STEP_WAIT %d 0\n", headrace::kStepWait);
    printf("FailureCode REPORTING %u 0\n", headrace::kReporting);
    printf("NO_INDEX value %u 0\n", headrace::kNoIndex);
    printf("LAST_STEP value %u 0\n", headrace::kLastStep);
    printf("EMPTY_KEY value %llu 0\n", static_cast<unsigned long long>(headrace::kEmptyKey));
    printf("NO_TOKEN value %d 0\n", headrace::kNoToken);
    printf("NO_STATE value %d 0\n", headrace::kNoState);
}
