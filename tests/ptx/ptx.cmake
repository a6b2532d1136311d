# Of a build with ADAMEZO_PTX: modules that run their CUDA kernels on the CPU, in the folder ptx of
# the build. They are no part of "all", and share the objects of the CPU's kernels with _native.

# Compiled for the machine that builds them, as nothing else runs them.
set(ptx_cxx ${exact_cxx} -march=native -fno-math-errno)
set(ptx_folder "${CMAKE_CURRENT_LIST_DIR}")
add_library(ptx_machine OBJECT EXCLUDE_FROM_ALL "${ptx_folder}/machine.cpp" "${ptx_folder}/cudart.cpp")
target_include_directories(ptx_machine SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_options(ptx_machine PRIVATE ${ptx_cxx} -Wall -Wextra)

# A module of the .cu files given, with those of their kernels whose names fit a regular expression.
function(add_ptx_module name include only)
  # The PTX that is shipped for GPUs of later architectures. --keep leaves it beside what is compiled
  # from it, so that kernels and the host code that launches them are of one run of nvcc.
  set(kept "${CMAKE_CURRENT_BINARY_DIR}/ptx/${name}")
  file(MAKE_DIRECTORY "${kept}")
  add_library(${name}_cuda OBJECT EXCLUDE_FROM_ALL ${ARGN})
  set_target_properties(${name}_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
    CUDA_VISIBILITY_PRESET hidden CUDA_ARCHITECTURES 90-virtual)
  target_include_directories(${name}_cuda PRIVATE "${include}")
  target_compile_options(${name}_cuda PRIVATE ${exact_cuda} --keep "--keep-dir=${kept}")

  set(parts 4)  # of a file's kernels, to compile side by side
  math(EXPR last "${parts} - 1")
  foreach(source ${ARGN})
    get_filename_component(file "${source}" NAME_WE)
    set(outputs)
    foreach(part RANGE ${last})
      list(APPEND outputs "${kept}/${file}_${part}.cpp")
    endforeach()
    add_custom_command(OUTPUT ${outputs}
      COMMAND "${Python_EXECUTABLE}" "${ptx_folder}/translate.py" "${kept}/${file}.ptx" "${kept}/${file}" ${parts} "${only}"
      DEPENDS "$<TARGET_OBJECTS:${name}_cuda>" "${ptx_folder}/translate.py"
      COMMENT "Translating ${file}.ptx"
      VERBATIM)
    list(APPEND translated ${outputs})
  endforeach()
  add_library(${name} MODULE EXCLUDE_FROM_ALL ${translated})
  target_include_directories(${name} PRIVATE "${ptx_folder}")
  target_compile_options(${name} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${ptx_cxx};-O1;-w>")
  set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".so" LIBRARY_OUTPUT_DIRECTORY ptx CUDA_RUNTIME_LIBRARY None)
  target_link_libraries(${name} PRIVATE ${name}_cuda ptx_machine)
endfunction()

# The whole module, with the CUDA sources of a folder such as csrc.
function(add_ptx_native name csrc only)
  file(GLOB sources CONFIGURE_DEPENDS "${csrc}/cuda/*.cu")
  add_ptx_module(${name} "${csrc}" "${only}" ${sources})
  # Not the object of _native, which would bring all of its own kernels with it.
  get_target_property(definitions _native COMPILE_DEFINITIONS)
  target_sources(${name} PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc/bindings.cpp")
  target_compile_definitions(${name} PRIVATE ${definitions})
  target_include_directories(${name} PRIVATE csrc)
  target_link_libraries(${name} PRIVATE kernels_cpu pybind11::module OpenMP::OpenMP_CXX)
endfunction()

add_ptx_native(ptx_native "${CMAKE_CURRENT_SOURCE_DIR}/csrc" "")
add_ptx_module(ptx_faulty "" "" "${ptx_folder}/faulty.cu")
if(EXISTS "${ADAMEZO_PTX_PLANTED}")
  add_ptx_native(ptx_planted "${ADAMEZO_PTX_PLANTED}" "${ADAMEZO_PTX_PLANTED_KERNELS}")
endif()
